"""The checkpoint reader of GGUF files: the names, layout and configuration of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import CheckpointError

from octavo_gguf.config import make_config, make_generation_config
from octavo_gguf.file import MAGIC, GGUFFile, TensorEntry
from octavo_gguf.names import NOT_WEIGHTS, hf_name, interleaved_projection
from octavo_gguf.tokenizer import make_tokenizer_files

if TYPE_CHECKING:
    import torch
    from octavo.checkpoints.interface import TensorInfo


class GGUFReader:
    """A GGUF file of a llama or qwen2 model. Quantized tensors are read as float32, others as they are stored.

    torch is imported when tensors are asked for: configuration and tokenizer need none.
    """

    def __init__(self, path: Path, options: object = None) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self._names = self._hf_names()
        self.config: dict[str, Any] = make_config(self._file, self._rope_factors())
        self.generation_config: dict[str, Any] = make_generation_config(self._file)

    @staticmethod
    def claims(path: Path) -> bool:
        """Whether `path` is a file that begins as GGUF files do."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by their Hugging Face names, with the dtypes that `read` gives."""
        from octavo.checkpoints.interface import TensorInfo

        from octavo_gguf.dequant import output_dtype

        return {name: TensorInfo(entry.shape, output_dtype(entry.type)) for name, entry in self._names.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU: mapped where it is stored plainly, else decoded to float32. Raises CheckpointError."""
        if name not in self._names:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.")
        return self._decode(self._names[name])

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """tokenizer.json and tokenizer_config.json, made from the metadata. Raises CheckpointError."""
        return make_tokenizer_files(self._file)

    def close(self) -> None:
        """Let go of the file for good; memory that tensors still use stays mapped until they are gone."""
        self._names = {}
        del self._file

    def _hf_names(self) -> dict[str, TensorEntry]:
        names: dict[str, TensorEntry] = {}
        for name, entry in self._file.tensors.items():
            if name in NOT_WEIGHTS:
                continue
            wanted = hf_name(name)
            if wanted is None:
                raise CheckpointError(
                    f"{self.path} holds the tensor {name!r}, which a dense llama or qwen2 model does not have; "
                    "this kind of model is not read."
                )
            names[wanted] = entry
        return names

    def _rope_factors(self) -> list[float] | None:
        entry = self._file.tensors.get("rope_freqs.weight")
        return None if entry is None else [float(x) for x in self._decode(entry).flatten()]

    def _decode(self, entry: TensorEntry) -> torch.Tensor:
        import torch

        from octavo_gguf.dequant import dequantize

        data = torch.frombuffer(self._file.data, dtype=torch.uint8, count=entry.size, offset=entry.offset)
        rows = data.view(-1, entry.size * entry.shape[-1] // _num_values(entry))
        heads = self._interleaved_heads(entry)
        if heads and len(entry.shape) == 1:
            rows = rows.view(entry.shape[0], -1)
        if heads:
            rows = rows[_rotated_rows(len(rows), heads, self.path, entry.name)]
        return dequantize(rows, entry.type).view(entry.shape)

    def _interleaved_heads(self, entry: TensorEntry) -> int:
        """The number of heads of a tensor whose rows the file has in another order, 0 for all others."""
        projection = interleaved_projection(entry.name)
        if projection is None or self._file.metadata["general.architecture"] != "llama":
            return 0
        heads: int = self.config["num_attention_heads" if projection == "q" else "num_key_value_heads"]
        return heads


def _num_values(entry: TensorEntry) -> int:
    return entry.size // entry.type.size * entry.type.values


def _rotated_rows(num_rows: int, num_heads: int, path: Path, name: str) -> torch.Tensor:
    """For each row of a Hugging Face q or k projection, its row in the file.

    llama.cpp rotates neighbouring pairs of a head's rows, Hugging Face a row of its first half with one of the second.
    """
    import torch

    if num_rows % (2 * num_heads):
        raise CheckpointError(f"{path}: the {num_rows} rows of {name!r} cannot be divided among {num_heads} heads.")
    return torch.arange(num_rows).view(num_heads, -1, 2).transpose(1, 2).reshape(-1)
