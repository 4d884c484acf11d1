"""Random weights for `--load-format dummy`: a model's speed and memory without its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.checkpoints.safetensors_reader import read_config, read_json
from octavo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from octavo.checkpoints.interface import TensorInfo

STANDARD_DEVIATION = 0.02


class DummyReader:
    """A directory with a config.json; the weights are random and depend on `seed` and their names only.

    Nobody but the model knows its shapes: `declare` must be told them before `read`.
    """

    def __init__(self, path: Path, options: object = None, *, seed: int = 0) -> None:
        if not path.is_dir():
            raise CheckpointError(f"--load-format dummy needs a directory with config.json, but {path} is none.")
        self.path = path
        self.seed = seed
        self.config = read_config(path)
        self.generation_config = read_json(path / "generation_config.json")
        self._infos: dict[str, TensorInfo] = {}

    @staticmethod
    def claims(path: Path) -> bool:
        """Never: random weights are served only to those who ask for them."""
        return False

    def declare(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Add the tensors that will be asked for, by name."""
        self._infos.update(tensors)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """All declared tensors by name."""
        return dict(self._infos)

    def read(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """A declared tensor: ones for norms, else normal with a standard deviation of 0.02; any codes for integers.

        A GPU draws its own, other numbers, since drawing and copying a CPU's takes minutes for a large model.
        """
        if name not in self._infos:
            raise CheckpointError(f"The dummy checkpoint of {self.path} was not told of a tensor {name!r}.")
        return random_tensor(name, self._infos[name], self.seed, device)

    def tokenizer_files(self) -> Path:
        """The directory itself."""
        return self.path

    def close(self) -> None:
        """Nothing is held."""


def random_tensor(name: str, info: TensorInfo, seed: int, device: torch.device | None = None) -> torch.Tensor:
    """The random tensor that belongs to a name and a seed, in `info`'s shape and dtype, on `device` (default: CPU)."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    device = device or torch.device("cpu")
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if not info.dtype.is_floating_point:
        return _random_codes(info, generator)
    if name.endswith("norm.weight"):
        return torch.ones(info.shape, dtype=info.dtype, device=device)
    if info.dtype.itemsize == 1:  # float8 cannot be filled in place
        values = torch.randn(info.shape, generator=generator, device=device)
        return values.mul_(STANDARD_DEVIATION).to(info.dtype)
    empty = torch.empty(info.shape, dtype=info.dtype, device=device)
    return empty.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def _random_codes(info: TensorInfo, generator: torch.Generator) -> torch.Tensor:
    import torch

    device = generator.device
    if info.dtype is torch.bool:
        return torch.randint(0, 2, info.shape, generator=generator, device=device).bool()
    limits = torch.iinfo(info.dtype)
    return torch.randint(limits.min, limits.max, info.shape, generator=generator, dtype=info.dtype, device=device)
