"""Keys and values as 8-bit codes with a float32 scale for each KV head: code = round(clamp(value / scale))."""

from typing import ClassVar

import torch
from octavo.kv_cache.interface import CodeRange, KVCache, KVSpec
from octavo.memo import StepMemo


class EightBits:
    """A page is keys [Hk, block_size, D], then values likewise, a byte each. A format is a subclass with its dtype."""

    layout: ClassVar[str]
    dtype: ClassVar[torch.dtype]
    codes: ClassVar[CodeRange]

    @classmethod
    def why_not(cls, spec: KVSpec, options: object) -> str | None:
        """Codes stand for values of any floating dtype, in blocks of a power of two."""
        if spec.block_size.bit_count() != 1:
            return f"the {cls.layout} format has blocks of a power of two of tokens, not of {spec.block_size}"
        if not spec.dtype.is_floating_point:
            return f"the {cls.layout} format holds values of floating dtypes, not of {spec.dtype}"
        return None

    def __init__(self, spec: KVSpec, options: object = None) -> None:
        self.spec = spec
        self.shift = spec.block_size.bit_length() - 1
        self._places = StepMemo(self._places_of)

    def page_bytes(self) -> int:
        """Bytes of one block of one layer: 2 Hk block_size D."""
        spec = self.spec
        return 2 * spec.num_kv_heads * spec.block_size * spec.head_dim

    def view(self, raw: torch.Tensor, scales: torch.Tensor | None = None) -> KVCache:
        """See raw uint8 [N, page_bytes] as codes k and v [N, Hk, block_size, D], with scales [2, Hk] or 1."""
        spec = self.spec
        if scales is None:
            scales = torch.ones(2, spec.num_kv_heads, device=raw.device)
        pages = raw.view(self.dtype).view(raw.shape[0], 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        return KVCache(raw, pages[:, 0], pages[:, 1], *scales.unbind())

    def write(self, kv: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k, v [T, Hk, D] at slots [T]; slot -1 lands in the null block, which may hold any bits."""
        places, head_dim = self._places(slots), self.spec.head_dim
        assert kv.k_scale is not None and kv.v_scale is not None, "view gives scales"
        # Keys and values lie alike, so one call of each operator serves both.
        scaled = torch.cat((k, v), dim=1) / torch.cat((kv.k_scale, kv.v_scale)).unsqueeze(-1)
        if kv.counts is not None:
            self._count(kv.counts, scaled, slots)
        codes = self._encode(scaled.clamp_(-self.codes.largest, self.codes.largest))
        kv.raw.view(-1, head_dim).index_copy_(0, places, codes.view(torch.uint8).view(-1, head_dim))

    def _encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """The codes nearest to values within their range, ties to even; `scaled` may be overwritten."""
        return scaled.to(self.dtype)

    def _count(self, counts: torch.Tensor, scaled: torch.Tensor, slots: torch.Tensor) -> None:
        """Add to counts [2] the values beyond the codes' range, and all values, of tokens that are written."""
        written = slots >= 0
        clipped = (scaled.abs() > self.codes.largest).sum((1, 2)) * written
        counts += torch.stack((clipped.sum(), written.sum() * scaled[:1].numel()))

    def _places_of(self, slots: torch.Tensor) -> torch.Tensor:
        """Where the keys', then the values' heads of slots [T] lie, counted in heads of one token: [T * 2 Hk]."""
        spec, slots = self.spec, slots.clamp_min(0)
        heads = torch.arange(2 * spec.num_kv_heads, device=slots.device)
        first = (slots >> self.shift) * (2 * spec.num_kv_heads)
        places = (first.unsqueeze(1) + heads << self.shift) + (slots & (spec.block_size - 1)).unsqueeze(1)
        return places.view(-1)

    def read(self, kv: KVCache, blocks: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first n tokens of blocks [B] as float32 (k, v), each [n, Hk, D]."""
        assert kv.k_scale is not None and kv.v_scale is not None, "view gives scales"
        return self._tokens(kv.k, kv.k_scale, blocks, n), self._tokens(kv.v, kv.v_scale, blocks, n)

    def _tokens(self, pages: torch.Tensor, scale: torch.Tensor, blocks: torch.Tensor, n: int) -> torch.Tensor:
        heads, head_dim = pages.shape[1], pages.shape[3]
        codes = pages.view(torch.uint8)[blocks].transpose(1, 2).reshape(-1, heads, head_dim)[:n]
        return codes.view(self.dtype).float().mul_(scale.unsqueeze(-1))


class Float8E4M3(EightBits):
    """float8_e4m3fn: relative steps of 1/8 from 2^-6 to 448.

    Twice the largest value seen is cheap headroom: a step is relative, so only values below 2^-6 scales lose by it.
    Rotary embedding alone can make an element sqrt(2) times the largest that its pair has shown at other positions.
    """

    layout = "fp8"
    dtype = torch.float8_e4m3fn
    codes = CodeRange(448.0, 2.0)


class Float8E5M2(EightBits):
    """float8_e5m2: relative steps of 1/4 from 2^-14 to 57,344. Headroom costs even less than in e4m3."""

    layout = "fp8_e5m2"
    dtype = torch.float8_e5m2
    codes = CodeRange(57344.0, 2.0)


class Int8(EightBits):
    """Integers from -127 to 127, in equal steps: headroom makes each of them wider, so there is less of it."""

    layout = "int8"
    dtype = torch.int8
    codes = CodeRange(127.0, 1.5)

    def _encode(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round_().to(torch.int8)
