"""The reader of Hugging Face directories: config.json and safetensors files, mapped. Never pickle, never code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, TypeVar

from octavo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from octavo.checkpoints.interface import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZATION = ("quantize_config.json", "quant_config.json")
"""Where tools described a quantization before config.json had a place for it."""
_QUANTIZATION_KEYS = {"quant_method", "bits", "w_bit"}  # other tools write files of these names for other ends
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MAX_JSON_BYTES = 64 << 20
"""Of a configuration or an index; those of the largest models have a few MB."""
T = TypeVar("T")

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' names of dtypes, with torch's."""


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file, {} where the file is missing and not required. Raises CheckpointError."""
    if not required and not path.exists():
        return {}
    try:
        _check_file(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, but must hold a JSON object.")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory, with a quantization that only a file beside it describes. Raises CheckpointError."""
    config = read_json(path / "config.json", required=True)
    if not config.get("quantization_config"):
        found = (read_json(path / name) for name in QUANTIZATION)
        beside = next((one for one in found if one.keys() & _QUANTIZATION_KEYS), None)
        config |= {"quantization_config": beside} if beside else {}
    return config


def _check_file(path: Path) -> None:
    """Refuse what could be read without end. Raises CheckpointError, or OSError for a path that leads nowhere."""
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is no file: put the model's own there.")
    if status.st_size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {status.st_size} bytes, but at most {MAX_JSON_BYTES} are read. Fetch the model again."
        )


class SafetensorsReader:
    """An HF directory. Files are found and config.json is read at once, tensors are mapped when asked for."""

    def __init__(self, path: Path, options: object = None) -> None:
        self.path = path
        self.config = read_config(path)
        self.generation_config = read_json(path / "generation_config.json")
        self._shards = _find_shards(path)
        self._places: dict[str, _Place] | None = None

    @staticmethod
    def claims(path: Path) -> bool:
        """Whether `path` is a directory with a config.json or with weights in safetensors or pickle files."""
        return path.is_dir() and (
            (path / "config.json").is_file()
            or any(path.glob("*.safetensors"))
            or any(any(path.glob(pattern)) for pattern in PICKLES)
        )

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name, from the headers of the files. Raises CheckpointError for a damaged file."""
        return {name: place.info for name, place in self._located().items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, mapped. Raises CheckpointError."""
        place = self._located().get(name)
        if place is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.")
        tensor: torch.Tensor = _guarded(place.path, lambda: place.file.get_tensor(name))
        return tensor

    def tokenizer_files(self) -> Path:
        """The directory itself."""
        return self.path

    def close(self) -> None:
        """Let go of the files; memory that tensors still use stays mapped until they are gone."""
        self._places = {}

    def _located(self) -> dict[str, _Place]:
        if self._places is None:
            self._places = _locate(self.path, self._shards)
        return self._places


class _Place:
    """Where a tensor is, and what it is."""

    __slots__ = ("file", "info", "path")

    def __init__(self, path: Path, file: Any, info: TensorInfo) -> None:
        self.path = path
        self.file = file
        self.info = info


def _guarded(path: Path, action: Callable[[], T]) -> T:
    """Run `action` on a safetensors file, its errors as sentences."""
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:  # the safetensors library has one error of its own and raises several others
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file: {error}. It is damaged or truncated: fetch it again."
        ) from error


def _find_shards(path: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the names that the index promises (None: no index, all that is there)."""
    if (path / INDEX).is_file():
        return _indexed_shards(path)
    files = [path / SINGLE] if (path / SINGLE).is_file() else _loose_shards(path)
    if not files:
        raise CheckpointError(_no_weights(path))
    return dict.fromkeys(files)


def _loose_shards(path: Path) -> list[Path]:
    """Files of other names; consolidated.* are the same weights under their author's own names."""
    return sorted(
        file for file in path.glob("*.safetensors") if file.is_file() and not file.name.startswith("consolidated")
    )


def _indexed_shards(path: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map that says which file holds which tensor.")
    shards: dict[Path, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / INDEX} puts the tensor {tensor!r} into {name!r}, but only .safetensors files in the same "
                "directory are read."
            )
        names = shards.setdefault(path / name, set())
        assert names is not None
        names.add(tensor)
    for file in shards:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {INDEX} names it: fetch the model again.")
    return shards


def _no_weights(path: Path) -> str:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if not pickles:
        return f"{path} holds no .safetensors file: give a directory with the model's weights, or --load-format dummy."
    return (
        f"{path} has its weights as pickle files only ({', '.join(pickles[:3])}), which are refused because loading a "
        "pickle can run any code. Convert the model to safetensors, or use a copy of it that has .safetensors files."
    )


def _locate(path: Path, shards: Mapping[Path, set[str] | None]) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for file, promised in shards.items():
        found = _guarded(file, lambda file=file: _open_shard(file))  # type: ignore[misc]
        missing = sorted((promised or set()) - found.keys())
        if missing:
            raise CheckpointError(f"{file} does not hold the tensor {missing[0]!r}, though {INDEX} says so.")
        for name, place in found.items():
            if promised is not None and name not in promised:
                continue
            if name in places:
                raise CheckpointError(f"{path} holds the tensor {name!r} twice: in {places[name].path} and in {file}.")
            places[name] = place
    return places


def _open_shard(path: Path) -> dict[str, _Place]:
    """All tensors of one file; opening it checks that the header is sound and fits the file's size."""
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")  # Any: its methods are not annotated
    return {name: _Place(path, file, _info(path, name, file.get_slice(name))) for name in file.keys()}  # noqa: SIM118


def _info(path: Path, name: str, piece: Any) -> TensorInfo:
    import torch

    from octavo.checkpoints.interface import TensorInfo

    stored = piece.get_dtype()
    if stored not in DTYPES:
        raise CheckpointError(f"{path}: the tensor {name!r} has the dtype {stored}, which is not read.")
    return TensorInfo(tuple(piece.get_shape()), getattr(torch, DTYPES[stored]))
