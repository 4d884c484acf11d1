"""The parser: what it reads, and that no damaged or hostile file gets past it."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.errors import CheckpointError
from octavo_gguf.file import GGUFFile
from octavo_gguf.reader import GGUFReader

Write = Callable[..., Path]
ONE_TENSOR = {"x": torch.arange(8.0).view(2, 4)}


@pytest.mark.parametrize("version", [2, 3])
def test_reads_metadata_and_tensors(tmp_path: Path, write_gguf: Write, version: int) -> None:
    metadata = {"a.int": 7, "a.float": 0.5, "a.flag": True, "a.text": "é", "a.texts": ["x", ""], "a.ints": [1, 2, 3]}
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", metadata, ONE_TENSOR, version=version))
    read = dict(file.metadata)
    assert isinstance(read["a.ints"], Sequence)
    read["a.ints"] = list(read["a.ints"])
    assert read == metadata
    entry = file.tensors["x"]
    assert (entry.shape, entry.type.name, entry.size) == ((2, 4), "F32", 32)
    assert struct.unpack("<8f", file.data[entry.offset : entry.offset + 32]) == tuple(range(8))


def test_alignment_is_respected(tmp_path: Path, write_gguf: Write) -> None:
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", {"general.alignment": 64}, ONE_TENSOR, offsets={"x": 0}))
    assert file.tensors["x"].offset % 64 == 0


def _head(tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def _entry(kind: int, value: bytes) -> bytes:
    return _head(entries=1) + struct.pack("<Q1sI", 1, b"k", kind) + value + bytes(64)


def _tensor(rank: int, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    info = struct.pack(f"<Q1sI{len(dims)}QIQ", 1, b"x", rank, *dims, kind, offset)
    return _head(tensors=1) + info + bytes(64)


HOSTILE = {
    "empty": (b"", "cannot be read"),
    "other magic": (b"GGML" + bytes(60), "does not begin with"),
    "old version": (_head(version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (_head(tensors=1 << 60), "cannot fit"),
    "many entries": (_head(entries=1 << 60) + bytes(64), "cannot fit"),
    "long key": (_head(entries=1) + struct.pack("<Q", 1 << 62) + bytes(64), "cannot fit"),
    "long string": (_entry(8, struct.pack("<Q", 1 << 40)), "cannot fit"),
    "not UTF-8": (_entry(8, struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
    "long array": (_entry(9, struct.pack("<IQ", 4, 1 << 61)), "cannot fit"),
    "long array of strings": (_entry(9, struct.pack("<IQ", 8, 1 << 61)), "cannot fit"),
    "nested array": (_entry(9, struct.pack("<IQ", 9, 1)), "not known here"),
    "unknown value type": (_entry(13, b""), "unknown value type 13"),
    "no dimensions": (_tensor(0, ()), "0 dimensions"),
    "many dimensions": (_tensor(1 << 31, ()), "dimensions"),
    "huge dimensions": (_tensor(2, (1 << 63, 1 << 63)), "only"),
    "zero dimension": (_tensor(2, (4, 0)), "impossible shape"),
    "broken block": (_tensor(1, (33,), kind=2), "impossible shape"),
    "far offset": (_tensor(1, (4,), offset=1 << 50), "only"),
    "odd offset": (_tensor(1, (4,), offset=4), "multiple of 32"),
    "unread type": (_tensor(1, (256,), kind=10), "Q2_K, which is not read"),
    "unknown type": (_tensor(1, (256,), kind=999), "999, which is not read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


def test_tensors_that_share_bytes_are_refused(tmp_path: Path, write_gguf: Write) -> None:
    tensors = {"x": torch.zeros(64), "y": torch.zeros(64)}
    with pytest.raises(CheckpointError, match="overlaps"):
        GGUFFile(write_gguf(tmp_path / "m.gguf", {}, tensors, offsets={"y": 32}))


def test_names_that_appear_twice_are_refused(tmp_path: Path) -> None:
    entry = struct.pack("<Q1sIB", 1, b"k", 7, 1)
    path = tmp_path / "m.gguf"
    path.write_bytes(_head(entries=2) + entry + entry)
    with pytest.raises(CheckpointError, match="'k' appears twice"):
        GGUFFile(path)


@pytest.mark.parametrize("alignment", [0, 7, 1 << 30, "x"])
def test_senseless_alignment_is_refused(tmp_path: Path, write_gguf: Write, alignment: int | str) -> None:
    with pytest.raises(CheckpointError, match=r"general\.alignment"):
        GGUFFile(write_gguf(tmp_path / "m.gguf", {"general.alignment": alignment}, ONE_TENSOR))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_gives_a_checkpoint_error_or_a_model(
    tmp_path: Path, write_gguf: Write, tiny_metadata: dict[str, Any], tiny_tensors: Any, data: st.DataObject
) -> None:
    """Whatever bytes of the head change, and wherever the file ends, nothing but CheckpointError comes out."""
    path = tmp_path / "m.gguf"
    if not path.exists():
        write_gguf(path, tiny_metadata, tiny_tensors)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    try:
        reader = GGUFReader(damaged)
        for name, info in reader.tensors().items():
            assert tuple(reader.read(name).shape) == info.shape
        reader.tokenizer_files()
    except CheckpointError as error:
        assert str(damaged) in str(error)
