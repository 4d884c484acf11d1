"""The communicator's interface. Layers call it without asking how many ranks there are."""

from typing import Protocol

import torch

API = 1


class Communicator(Protocol):
    """One rank's end of a group. Built as `Communicator(rank, size, options)`."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, the same bits on each; use the return value."""

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The ranks' tensors along `dim`, in rank order."""

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The source rank's tensor."""

    def close(self) -> None:
        """Leave the group."""
