"""The torch reference attention keeps the contract, in the plain format and in one of the tests' own."""

import torch
from octavo.attention.torch_reference import TorchAttention
from octavo.kv_cache.interface import KVCache, KVSpec
from octavo.testing import AttentionConformance


class FarFormat:
    """A KV format of the tests' own: float64 pages, values first and tokens before heads, 7 added to all."""

    layout = "far"

    @staticmethod
    def why_not(spec: KVSpec, options: object) -> str | None:
        return None

    def __init__(self, spec: KVSpec, options: object = None) -> None:
        self.spec = spec

    def page_bytes(self) -> int:
        return 2 * self.spec.block_size * self.spec.num_kv_heads * self.spec.head_dim * 8

    def view(self, raw: torch.Tensor) -> KVCache:
        spec = self.spec
        pages = raw.view(torch.float64).view(raw.shape[0], 2, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return KVCache(raw, pages[:, 1], pages[:, 0])

    def write(self, kv: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        live = slots >= 0
        slots, size = slots[live], self.spec.block_size
        for pages, values in ((kv.k, k), (kv.v, v)):
            pages[slots // size, slots % size] = values[live].double() + 7

    def read(self, kv: KVCache, blocks: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = ((pages[blocks].flatten(0, 1)[:n] - 7).float() for pages in (kv.k, kv.v))
        return k, v


class TestTorchAttention(AttentionConformance):
    backend = TorchAttention
    device = "cpu"
    dtypes = (torch.float32, torch.bfloat16)


class TestTorchAttentionThroughRead(AttentionConformance):
    """A layout that no backend indexes itself is attended through the format's `read`."""

    backend = TorchAttention
    device = "cpu"
    cache_format = FarFormat
    dtypes = (torch.bfloat16,)
    num_random_batches = 8
