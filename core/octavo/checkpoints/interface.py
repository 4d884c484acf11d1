"""The checkpoint reader's interface: one kind of file or directory, opened for reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # readers of configurations and tokenizers run in processes without torch
    import torch

API = 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader(Protocol):
    """A checkpoint in HF's names and layout, whatever the file's own are. Built as `Reader(path, options)`.

    Construction, `claims`, the configurations and `tokenizer_files` import no torch.
    """

    config: dict[str, Any]
    """config.json's content, or the same made from the file's metadata."""
    generation_config: dict[str, Any]
    """generation_config.json's content; empty where there is none."""

    def __init__(self, path: Path, options: object = None) -> None:
        """Open `path` and read its configuration. Raises CheckpointError."""

    @staticmethod
    def claims(path: Path) -> bool:
        """Whether `path` is of this reader's kind, from its name and first bytes only."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by name (`model.layers.0.self_attn.q_proj.weight`)."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, mapped rather than copied where that is possible. Raises CheckpointError."""

    def tokenizer_files(self) -> Path | Mapping[str, bytes]:
        """The directory that holds tokenizer.json, tokenizer_config.json, ..., or their contents by name."""

    def close(self) -> None:
        """Let go of the file."""
