"""The KV-cache format's interface: how keys and values lie in a block. The core owns the bytes."""

from dataclasses import dataclass
from typing import Protocol

import torch

API = 1


@dataclass(frozen=True, slots=True)
class KVSpec:
    """A block of one layer: `num_kv_heads` heads of `head_dim`, `block_size` tokens, keys and values of `dtype`."""

    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class KVCache:
    """One layer's cache. In the plain layout k and v are [N, Hk, block_size, D].

    Where the format has codes, k_scale and v_scale are [Hk] float32 on the device, and `counts` [2] int64, if it is
    there, counts the values that `write` clipped and all that it wrote.
    """

    raw: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    counts: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class CodeRange:
    """Codes from -`largest` to `largest`, which stand for themselves times a scale.

    A calibrated scale maps `headroom` times the largest value seen to `largest`.
    """

    largest: float
    headroom: float

    def scales(self, largest_values: torch.Tensor) -> torch.Tensor:
        """The scales of heads whose largest values are these; a head of zeros gets 1."""
        return torch.where(largest_values > 0, largest_values * (self.headroom / self.largest), 1.0)


class KVCacheFormat(Protocol):
    """Reads and writes the blocks of every layer. Built as `Format(spec, options)`."""

    layout: str
    codes: CodeRange | None
    """The codes that a format with scales stores; None (or no such member) for one without."""

    @staticmethod
    def why_not(spec: KVSpec, options: object) -> str | None:
        """One sentence when the format cannot hold `spec`, else None."""

    def page_bytes(self) -> int:
        """Bytes of one block of one layer."""

    def view(self, raw: torch.Tensor, scales: torch.Tensor | None = None) -> KVCache:
        """See raw uint8 [N, page_bytes] as a cache.

        `scales` [2, Hk] float32, of keys and of values, are given where the format has codes. Without them they are 1:
        for caches that only warm up or are tested; those that serve always have the scales that were asked for.
        """

    def write(self, kv: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k, v [T, Hk, D] at slots [T] int64; -1 stores nothing."""

    def read(self, kv: KVCache, blocks: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first n tokens of blocks [B] as float32 (k, v), each [n, Hk, D]."""
