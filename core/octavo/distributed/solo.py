"""Solo: the communicator of a single rank."""

import torch


class Solo:
    """Every exchange is the identity."""

    @staticmethod
    def why_not(spec: int, options: object) -> str | None:
        """Serves groups of one; `spec` is the number of ranks."""
        return None if spec == 1 else f"solo serves 1 rank, not {spec}"

    def __init__(self, rank: int = 0, size: int = 1, options: object = None) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x itself."""
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """x itself."""
        return x

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """x itself."""
        return x

    def close(self) -> None:
        """There is nothing to leave."""
