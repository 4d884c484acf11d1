"""Canonical weights against loops over single elements, and what may be joined."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.weights.bits import pack_octets
from octavo.weights.canonical import Dense, GroupedInt, ScaledFloat8, ScaledInt8, tensor_bytes


def grouped(
    out_features: int = 3, in_features: int = 20, group_size: int = 8, bits: int = 4, **given: Any
) -> GroupedInt:
    """A random weight; `given` are its optional tensors, or True for random ones."""
    in_features = 20
    groups = -(-in_features // group_size)
    random: dict[str, Any] = {
        "zeros": pack_octets(torch.randint(0, 1 << bits, (out_features, groups)), bits),
        "mins": torch.randn(out_features, groups).half(),
        "group_of": torch.randint(0, groups, (in_features,), dtype=torch.int32),
    }
    words = -(-in_features * bits // 32)
    return GroupedInt(
        bits=bits,
        in_features=in_features,
        group_size=group_size,
        codes=torch.randint(-(2**31), 2**31 - 1, (out_features, words), dtype=torch.int32),
        scales=torch.rand(out_features, groups).half(),
        **{name: random[name] if value is True else value for name, value in given.items()},
    )


def naive(weight: GroupedInt) -> torch.Tensor:
    """Element by element; a row of codes is one whole number whose low bits come first."""
    dense = torch.empty(weight.shape)
    for n in range(weight.shape[0]):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(weight.codes[n]))
        for k in range(weight.in_features):
            code = stream >> (weight.bits * k) & ((1 << weight.bits) - 1)
            group = k // weight.group_size if weight.group_of is None else int(weight.group_of[k])
            scale = weight.scales[n, group].float()
            if weight.mins is not None:
                dense[n, k] = code * scale + weight.mins[n, group].float()
            else:
                zero = int(weight.zero_points()[n, group])
                dense[n, k] = (code - zero) * scale
    return dense


def scaled(kind: Any, shape: tuple[int, int], block: tuple[int, int], input_scale: float | None = None) -> Any:
    """Random codes with a scale for each block."""
    dtype = torch.int8 if kind is ScaledInt8 else torch.float8_e4m3fn
    codes = torch.randint(-127, 127, shape) if kind is ScaledInt8 else torch.randn(shape)
    scales = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    static = None if input_scale is None else torch.tensor(input_scale)
    return kind(codes=codes.to(dtype), scales=scales, block=block, input_scale=static)


@pytest.mark.parametrize("optional", [(), ("zeros",), ("mins",), ("zeros", "group_of"), ("group_of",)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grouped_values(bits: int, optional: tuple[str, ...]) -> None:
    weight = grouped(bits=bits, **dict.fromkeys(optional, True))
    assert weight.shape == (3, 20)
    assert torch.equal(weight.dequantize(), naive(weight))
    assert weight.features == {"bits": bits, "group_size": 8} | dict.fromkeys(optional, True)


@pytest.mark.parametrize("optional", [(), ("zeros",), ("mins",)])
def test_grouped_weights_join(optional: tuple[str, ...]) -> None:
    parts = [grouped(n, **dict.fromkeys(optional, True)) for n in (3, 1, 2)]
    joined = GroupedInt.join(parts)
    assert joined is not None and joined.features == parts[0].features
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize() for one in parts]))


def test_grouped_weights_join_where_inputs_have_the_same_groups() -> None:
    first = grouped(group_of=True)
    second = grouped(group_of=first.group_of)
    joined = GroupedInt.join([first, second])
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))
    assert first.group_of is not None
    assert GroupedInt.join([first, grouped(group_of=first.group_of.flip(0))]) is None


@pytest.mark.parametrize(
    "other",
    [grouped(bits=3), grouped(group_size=4), grouped(zeros=True), grouped(mins=True), grouped(group_of=True)],
    ids=["bits", "group_size", "zeros", "mins", "group_of"],
)
def test_grouped_weights_that_differ_stay_apart(other: GroupedInt) -> None:
    assert GroupedInt.join([grouped(), other]) is None
    assert GroupedInt.join([other, grouped()]) is None


def test_scales_of_another_dtype_stay_apart() -> None:
    weight = grouped()
    assert GroupedInt.join([weight, replace(weight, scales=weight.scales.float())]) is None


@pytest.mark.parametrize("kind", [ScaledInt8, ScaledFloat8])
@pytest.mark.parametrize(
    ("block", "granularity"),
    [((5, 7), "tensor"), ((1, 7), "row"), ((2, 3), "block"), ((5, 3), "block"), ((2, 7), "block")],
)
def test_scaled_values(kind: Any, block: tuple[int, int], granularity: str) -> None:
    weight = scaled(kind, (5, 7), block)
    dense = weight.dequantize()
    for n in range(5):
        for k in range(7):
            assert dense[n, k] == weight.codes[n, k].float() * weight.scales[n // block[0], k // block[1]]
    extra = {"block": block} if granularity == "block" else {}
    assert weight.features == {"scales": granularity, "input_scale": False, **extra}
    assert granularity in str(weight)


@pytest.mark.parametrize("kind", [ScaledInt8, ScaledFloat8])
@pytest.mark.parametrize(
    ("blocks", "granularity"),
    [
        (((4, 6), (2, 6)), "row"),
        (((1, 6), (1, 6)), "row"),
        (((4, 6), (1, 6)), "row"),
        (((2, 3), (2, 3)), "block"),
    ],
    ids=["tensors", "rows", "a tensor and rows", "blocks"],
)
def test_scaled_weights_join(kind: Any, blocks: tuple[tuple[int, int], ...], granularity: str) -> None:
    parts = [scaled(kind, (n, 6), block, 0.5) for n, block in zip((4, 2), blocks, strict=True)]
    joined = kind.join(parts)
    assert type(joined) is kind and joined.granularity == granularity and joined.features["input_scale"]
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize() for one in parts]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (scaled(ScaledInt8, (3, 6), (2, 3)), scaled(ScaledInt8, (4, 6), (2, 3))),
        (scaled(ScaledInt8, (4, 6), (2, 3)), scaled(ScaledInt8, (4, 6), (2, 2))),
        (scaled(ScaledInt8, (4, 6), (2, 3)), scaled(ScaledInt8, (4, 6), (1, 6))),
        (scaled(ScaledInt8, (4, 6), (1, 6), 0.5), scaled(ScaledInt8, (4, 6), (1, 6), 0.25)),
        (scaled(ScaledInt8, (4, 6), (1, 6), 0.5), scaled(ScaledInt8, (4, 6), (1, 6))),
    ],
    ids=["a block is cut", "other blocks", "blocks and rows", "input scales", "an input scale"],
)
def test_scaled_weights_that_differ_stay_apart(first: ScaledInt8, second: ScaledInt8) -> None:
    assert ScaledInt8.join([first, second]) is None


def test_a_cut_block_at_the_end_joins() -> None:
    parts = [scaled(ScaledFloat8, (4, 6), (2, 3)), scaled(ScaledFloat8, (3, 6), (2, 3))]
    joined = ScaledFloat8.join(parts)
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize() for one in parts]))


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        (Dense(torch.ones(2, 3).bfloat16()), "dense bfloat16"),
        (grouped(), "4-bit integers, groups of 8, symmetric"),
        (grouped(bits=3, zeros=True, group_of=True), "3-bit integers, groups of 8, in any order, zero points"),
        (grouped(mins=True), "4-bit integers, groups of 8, minima"),
        (scaled(ScaledInt8, (4, 6), (1, 6)), "int8, a scale for each row"),
        (scaled(ScaledFloat8, (4, 6), (2, 3), 1.0), "float8_e4m3fn, a scale for each 2x3 block, static input scale"),
    ],
)
def test_descriptions(weight: Any, text: str) -> None:
    assert str(weight) == text


def test_bytes_are_those_of_all_tensors() -> None:
    assert tensor_bytes(grouped()) == 3 * 3 * 4 + 3 * 3 * 2
    assert tensor_bytes(grouped(zeros=True, group_of=True)) == 3 * 3 * 4 + 3 * 3 * 2 + 3 * 2 + 20 * 4
    assert tensor_bytes(scaled(ScaledFloat8, (4, 6), (1, 6), 1.0)) == 24 + 16 + 4
    assert tensor_bytes([Dense(torch.ones(2, 3)), (torch.ones(2).half(), None, 7)]) == 24 + 4
