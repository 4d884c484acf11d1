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
    """One layer's cache. In the plain layout k and v are [N, Hk, block_size, D]; scales are device tensors or None."""

    raw: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


class KVCacheFormat(Protocol):
    """Reads and writes the blocks of every layer. Built as `Format(spec, options)`."""

    layout: str

    @staticmethod
    def why_not(spec: KVSpec, options: object) -> str | None:
        """One sentence when the format cannot hold `spec`, else None."""

    def page_bytes(self) -> int:
        """Bytes of one block of one layer."""

    def view(self, raw: torch.Tensor) -> KVCache:
        """See raw uint8 [N, page_bytes] as a cache."""

    def write(self, kv: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k, v [T, Hk, D] at slots [T] int64; -1 stores nothing."""

    def read(self, kv: KVCache, blocks: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first n tokens of blocks [B] as float32 (k, v), each [n, Hk, D]."""
