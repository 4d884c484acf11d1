"""A parser of GGUF files (versions 2 and 3, little endian) that trusts no count, length or offset in them.

The file is mapped. Whatever it claims is compared with its size before memory is taken for it, so that the memory used
is bounded by a small multiple of the file.
"""

import math
import mmap
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from octavo.errors import CheckpointError

from octavo_gguf.types import BLOCK_TYPES, UNREAD_TYPES, BlockType

MAGIC = b"GGUF"
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
MIN_ENTRY_BYTES = 8 + 4 + 1  # key length, value type, the shortest value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, rank, one dimension, type, offset

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Value types other than strings and arrays, with the letter that struct and array use."""

Scalar = int | float | bool | str
Value = Scalar | Sequence[Scalar]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place in the file. `shape` has rows first, as torch has it; `offset` is from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    size: int


class _Cursor:
    """Reads values one after another, each checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}. The file is damaged or truncated: fetch it again.")

    def skip(self, size: int, what: str) -> int:
        """Move past `size` bytes and return where they start."""
        start = self.position
        left = len(self.data) - start
        if size > left:
            self.fail(f"{what} at byte {start} needs {size} bytes, but only {left} are left")
        self.position = start + size
        return start

    def number(self, letter: str, what: str) -> int:
        value: int = struct.unpack_from(f"<{letter}", self.data, self.skip(struct.calcsize(letter), what))[0]
        return value

    def count(self, what: str, min_bytes: int) -> int:
        """A 64-bit count of things of at least `min_bytes` bytes each."""
        count = self.number("Q", what)
        left = len(self.data) - self.position
        if count * min_bytes > left:
            self.fail(f"{what} is {count}, which cannot fit in the {left} bytes that are left")
        return count

    def string(self, what: str) -> str:
        length = self.count(f"the length of {what}", 1)
        start = self.skip(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8")

    def value(self, kind: int, what: str) -> Value:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in SCALARS:
            self.fail(f"{what} has the unknown value type {kind}")
        number = self.number(SCALARS[kind], what)
        return bool(number) if kind == BOOL else number

    def array(self, what: str) -> Sequence[Scalar]:
        kind = self.number("I", f"the element type of {what}")
        if kind == STRING:
            return [self.string(what) for _ in range(self.count(f"the length of {what}", 8))]
        if kind not in SCALARS:
            self.fail(f"{what} is an array of elements of type {kind}, which is not known here")
        values = array(SCALARS[kind])
        size = self.count(f"the length of {what}", values.itemsize) * values.itemsize
        start = self.skip(size, what)
        values.frombytes(self.data[start : start + size])
        return values


class GGUFFile:
    """A mapped GGUF file: `metadata` by key and `tensors` by name. Raises CheckpointError for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _map_file(path)
        cursor = _Cursor(self.data, path)
        self.version = _read_version(cursor)
        num_tensors = cursor.count("the number of tensors", MIN_TENSOR_BYTES)
        num_entries = cursor.count("the number of metadata entries", MIN_ENTRY_BYTES)
        self.metadata = _read_metadata(cursor, num_entries)
        self.tensors = _read_tensors(cursor, num_tensors, _alignment(cursor, self.metadata))


def _map_file(path: Path) -> mmap.mmap:
    """Map the file privately: torch wants writable memory, and what it wrote would stay in this process."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _read_version(cursor: _Cursor) -> int:
    start = cursor.skip(4, "the magic number")
    if cursor.data[start : start + 4] != MAGIC:
        raise CheckpointError(f"{cursor.path} is not a GGUF file: it does not begin with {MAGIC.decode()!r}.")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        kind = "a big-endian file" if version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{cursor.path} is {kind}; GGUF versions 2 and 3, little endian, are read. Convert the model anew."
        )
    return version


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(count):
        key = cursor.string(f"the key of metadata entry {index}")
        if key in metadata:
            cursor.fail(f"the metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key!r}"), repr(key))
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment % 8 or not 8 <= alignment <= 1 << 20:
        cursor.fail(f"general.alignment is {alignment!r}, but must be a multiple of 8 from 8 to {1 << 20}")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorEntry]:
    entries = [_read_entry(cursor, index) for index in range(count)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorEntry] = {}
    for name, shape, block, offset in entries:
        if name in tensors:
            cursor.fail(f"the tensor {name!r} appears twice")
        if offset % alignment:
            cursor.fail(f"the tensor {name!r} begins at offset {offset}, not at a multiple of {alignment}")
        size = math.prod(shape) // block.values * block.size
        tensors[name] = TensorEntry(name, shape, block, start + offset, size)
    _check_places(cursor, tensors)
    return tensors


def _read_entry(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], BlockType, int]:
    name = cursor.string(f"the name of tensor {index}")
    rank = cursor.number("I", f"the rank of {name!r}")
    if not 1 <= rank <= MAX_DIMENSIONS:
        cursor.fail(f"the tensor {name!r} has {rank} dimensions, but may have 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q", f"a dimension of {name!r}") for _ in range(rank))[::-1]
    block = _block_type(cursor, name, cursor.number("I", f"the type of {name!r}"))
    if 0 in shape or shape[-1] % block.values:
        cursor.fail(f"the tensor {name!r} of type {block.name} has the impossible shape {list(shape)}")
    return name, shape, block, cursor.number("Q", f"the offset of {name!r}")


def _block_type(cursor: _Cursor, name: str, kind: int) -> BlockType:
    if kind not in BLOCK_TYPES:
        known = ", ".join(block.name for block in BLOCK_TYPES.values())
        raise CheckpointError(
            f"{cursor.path}: the tensor {name!r} has the type {UNREAD_TYPES.get(kind, kind)}, which is not read; "
            f"use a file with the types {known}."
        )
    return BLOCK_TYPES[kind]


def _check_places(cursor: _Cursor, tensors: dict[str, TensorEntry]) -> None:
    """Refuse tensors past the end, and ones that overlap: a small file could else claim any amount of memory."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            cursor.fail(f"the tensor {tensor.name!r} overlaps the one before it")
        end = tensor.offset + tensor.size
        if end > len(cursor.data):
            cursor.fail(
                f"the tensor {tensor.name!r} ends at byte {end}, but the file has only {len(cursor.data)} bytes"
            )
