"""The canonical weights between checkpoint formats and kernels, so that the two do not multiply.

Each knows its shape, its dense value, what a kernel must be able to do (`features`), and how layers with the same input
are laid side by side (`join`, None where that would not be exact).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch

from octavo.weights.bits import unpack_bits


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """`weight` [out, in] in a floating dtype."""

    weight: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def features(self) -> Mapping[str, Any]:
        """Nothing beyond a dense product."""
        return {}

    def dequantize(self) -> torch.Tensor:
        """The weight in float32."""
        return self.weight.float()

    @classmethod
    def join(cls, weights: Sequence[Self]) -> Self | None:
        """Their outputs one after the other."""
        return cls(torch.cat([one.weight for one in weights]))

    def __str__(self) -> str:
        return f"dense {str(self.weight.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class GroupedInt:
    """Integers of `bits` bits with a scale for each group of input features.

    W[n, k] = (code - zero) * scale, or code * scale + min, of group k // group_size, or group_of[k]. Without `zeros`
    and `mins` the zero point is 2^(bits - 1). `codes` are a bit stream along the input, `zeros` along the groups
    (octavo.weights.bits); `zero_points` are the latter, one by one.

    | tensor | shape | dtype |
    |---|---|---|
    | codes | [out, ceil(in bits / 32)] | int32 |
    | scales, mins | [out, groups] | floating |
    | zeros | [out, ceil(groups bits / 8)] | uint8 |
    | group_of | [in] | int32 |
    """

    bits: int
    in_features: int
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    mins: torch.Tensor | None = None
    group_of: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        return (self.codes.shape[0], self.in_features)

    @property
    def features(self) -> Mapping[str, Any]:
        """`bits`, `group_size`, and of `zeros`, `mins` and `group_of` those that are there."""
        given = {name: True for name in ("zeros", "mins", "group_of") if getattr(self, name) is not None}
        return {"bits": self.bits, "group_size": self.group_size, **given}

    def dequantize(self) -> torch.Tensor:
        """The weight in float32."""
        values = unpack_bits(self.codes, self.bits, self.in_features).float()
        if self.zeros is not None:
            values -= self._spread(self.zero_points().float())
        elif self.mins is None:
            values -= 1 << (self.bits - 1)
        values *= self._spread(self.scales.float())
        return values if self.mins is None else values.add_(self._spread(self.mins.float()))

    def zero_points(self) -> torch.Tensor:
        """The zero points [out, groups] uint8; of a symmetric weight they are all the same."""
        if self.zeros is None:
            return torch.full_like(self.scales, 1 << (self.bits - 1), dtype=torch.uint8)
        return unpack_bits(self.zeros, self.bits, self.scales.shape[1])

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """What belongs to the groups [out, groups], for each input [out, in]."""
        if self.group_of is not None:
            return values.index_select(1, self.group_of)
        return _repeat(values, 1, self.group_size)[:, : self.in_features]

    @classmethod
    def join(cls, weights: Sequence[Self]) -> Self | None:
        """Their outputs one after the other, where bits and groups are the same."""
        first = weights[0]
        for one in weights[1:]:
            if one.features != first.features or one.scales.dtype != first.scales.dtype:
                return None
            if first.group_of is not None and not torch.equal(first.group_of, _present(one.group_of)):
                return None
        joined = {name: _cat(weights, name) for name in ("codes", "scales", "zeros", "mins")}
        return replace(first, **joined)  # type: ignore[arg-type]

    def __str__(self) -> str:
        kind = "zero points" if self.zeros is not None else "minima" if self.mins is not None else "symmetric"
        order = ", in any order" if self.group_of is not None else ""
        return f"{self.bits}-bit integers, groups of {self.group_size}{order}, {kind}"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Scaled:
    """8-bit codes [out, in] with float32 scales [ceil(out / rows), ceil(in / columns)] of blocks (rows, columns).

    W[n, k] = code * scale of its block. One scale for the tensor is a block (out, in), one a row a block (1, in).
    `input_scale` [] is the static scale of a layer whose inputs may be quantized too.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def granularity(self) -> str:
        """One of "tensor", "row" and "block"."""
        if self.block[1] < self.shape[1]:
            return "block"
        return "row" if self.block[0] == 1 else "tensor" if self.block[0] >= self.shape[0] else "block"

    @property
    def features(self) -> Mapping[str, Any]:
        """`scales` by "tensor", "row" or "block", `block` for the last, and `input_scale` where it is static."""
        block = {"block": self.block} if self.granularity == "block" else {}
        return {"scales": self.granularity, **block, "input_scale": self.input_scale is not None}

    def dequantize(self) -> torch.Tensor:
        """The weight in float32."""
        (rows, columns), (out_features, in_features) = self.block, self.shape
        values = self.codes.float()
        if self.granularity != "block":
            return values.mul_(self.scales)
        spread = _repeat(_repeat(self.scales, 0, rows)[:out_features], 1, columns)
        return values.mul_(spread[:, :in_features])

    @classmethod
    def join(cls, weights: Sequence[Self]) -> Self | None:
        """Their outputs one after the other: by row where no blocks are cut, and where inputs have the same scale."""
        first = weights[0]
        if any(
            one.codes.dtype != first.codes.dtype or not _same(one.input_scale, first.input_scale) for one in weights
        ):
            return None
        if any(one.granularity == "block" for one in weights):
            if any(one.block != first.block for one in weights):
                return None
            if any(one.shape[0] % one.block[0] for one in weights[:-1]):
                return None
            scales, block = torch.cat([one.scales for one in weights]), first.block
        else:
            scales = torch.cat([one.scales.expand(one.shape[0], 1) for one in weights])
            block = (1, first.shape[1])
        return cls(codes=_cat_codes(weights), scales=scales, block=block, input_scale=first.input_scale)

    def __str__(self) -> str:
        blocks = f"{self.block[0]}x{self.block[1]} block" if self.granularity == "block" else self.granularity
        static = ", static input scale" if self.input_scale is not None else ""
        return f"{str(self.codes.dtype).removeprefix('torch.')}, a scale for each {blocks}{static}"


class ScaledFloat8(_Scaled):
    """Codes in float8_e4m3fn or float8_e5m2."""

    __slots__ = ()

    @property
    def features(self) -> Mapping[str, Any]:
        """Those of every scaled weight, and `e5m2` for codes of that dtype."""
        common = super().features
        return {**common, "e5m2": True} if self.codes.dtype is torch.float8_e5m2 else common


class ScaledInt8(_Scaled):
    """Codes in int8, symmetric."""

    __slots__ = ()


def tensor_bytes(value: object) -> int:
    """Bytes of the tensors that a weight, or what a kernel packed it into, is made of."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(tensor_bytes, value))
    if hasattr(value, "__dataclass_fields__"):
        return sum(tensor_bytes(getattr(value, item.name)) for item in fields(cast(Any, value)))
    return 0


def _repeat(values: torch.Tensor, axis: int, times: int) -> torch.Tensor:
    """Each element `times` times in a row along an axis of [a, b]; repeat_interleave might wait for a GPU."""
    spread = list(values.shape)
    spread.insert(axis + 1, times)
    return values.unsqueeze(axis + 1).expand(spread).flatten(axis, axis + 1)


def _cat(weights: Sequence[GroupedInt], name: str) -> torch.Tensor | None:
    parts = [getattr(one, name) for one in weights]
    return None if parts[0] is None else torch.cat(parts)


def _cat_codes(weights: Sequence[_Scaled]) -> torch.Tensor:
    """Codes laid side by side; as bytes, since not every device concatenates float8."""
    dtype = weights[0].codes.dtype
    return torch.cat([one.codes.view(torch.uint8) for one in weights]).view(dtype)


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "equal features"
    return tensor


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
