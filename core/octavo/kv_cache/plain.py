"""The plain KV-cache format: keys and values in the model's dtype, as they come."""

import torch

from octavo.kv_cache.interface import CodeRange, KVCache, KVSpec
from octavo.memo import StepMemo

LAYOUT = "plain"


class PlainFormat:
    """A page is keys [Hk, block_size, D], then values likewise, so that a head's tokens of a block lie together."""

    layout = LAYOUT
    codes: CodeRange | None = None

    @staticmethod
    def why_not(spec: KVSpec, options: object) -> str | None:
        """Any floating dtype can be held, in blocks of a power of two."""
        if spec.block_size.bit_count() != 1:
            return f"the plain format has blocks of a power of two of tokens, not of {spec.block_size}"
        return None if spec.dtype.is_floating_point else f"the plain format holds floating dtypes, not {spec.dtype}"

    def __init__(self, spec: KVSpec, options: object = None) -> None:
        self.spec = spec
        self.shift = spec.block_size.bit_length() - 1
        self._half = spec.num_kv_heads * spec.block_size  # heads of one token in a page's keys, or in its values
        self._rows = StepMemo(self._rows_of)

    def page_bytes(self) -> int:
        """Bytes of one block of one layer: 2 Hk block_size D elements."""
        spec = self.spec
        return 2 * spec.num_kv_heads * spec.block_size * spec.head_dim * spec.dtype.itemsize

    def view(self, raw: torch.Tensor, scales: torch.Tensor | None = None) -> KVCache:
        """See raw uint8 [N, page_bytes] as k and v [N, Hk, block_size, D]. There are no scales."""
        spec = self.spec
        pages = raw.view(spec.dtype).view(raw.shape[0], 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return KVCache(raw, pages[:, 0], pages[:, 1])

    def write(self, kv: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k, v [T, Hk, D] at slots [T]; slot -1 lands in the null block, which may hold any bits."""
        rows, head_dim = self._rows(slots), self.spec.head_dim
        for pages, values in ((kv.k, k), (kv.v, v)):
            count = (2 * pages.shape[0] - 1) * self._half
            tokens = pages.as_strided((count, head_dim), (head_dim, 1))
            tokens.index_copy_(0, rows, values.reshape(-1, head_dim))

    def _rows_of(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the heads of slots [T] lie, counted in heads of one token from the first page's keys on: [T * Hk]."""
        spec, slots = self.spec, slots.clamp_min(0)
        first = (slots >> self.shift) * (2 * self._half) + (slots & (spec.block_size - 1))
        heads = torch.arange(0, self._half, spec.block_size, device=slots.device)
        return (first.unsqueeze(1) + heads).view(-1)

    def read(self, kv: KVCache, blocks: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first n tokens of blocks [B] as float32 (k, v), each [n, Hk, D]."""
        return _tokens(kv.k, blocks, n), _tokens(kv.v, blocks, n)


def _tokens(pages: torch.Tensor, blocks: torch.Tensor, n: int) -> torch.Tensor:
    heads, head_dim = pages.shape[1], pages.shape[3]
    return pages[blocks].transpose(1, 2).reshape(-1, heads, head_dim)[:n].float()
