"""GroupedInt: its value by a naive loop, layers laid side by side, and what is not laid side by side."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.weights.bits import pack_bits, pack_octets
from octavo.weights.canonical import GroupedInt, tensor_bytes


@dataclass(frozen=True)
class Kind:
    """What two layers must share to be joined."""

    bits: int
    in_features: int
    group_size: int
    offset: str
    ordered: bool


KINDS = st.builds(
    Kind,
    bits=st.sampled_from((2, 3, 4, 5, 6, 8)),
    in_features=st.integers(1, 80),
    group_size=st.sampled_from((1, 8, 32, 80)),
    offset=st.sampled_from(("none", "zeros", "mins")),
    ordered=st.booleans(),
)


def make(kind: Kind, out_features: int, seed: int, group_of: torch.Tensor | None = None) -> GroupedInt:
    """A random weight of the kind."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-kind.in_features // kind.group_size)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    def halves() -> torch.Tensor:
        return torch.randn(out_features, groups, generator=generator).half()

    codes = integers(1 << kind.bits, out_features, kind.in_features)
    return GroupedInt(
        bits=kind.bits,
        in_features=kind.in_features,
        group_size=kind.group_size,
        codes=pack_bits(codes, kind.bits),
        scales=halves(),
        zeros=pack_octets(integers(1 << kind.bits, out_features, groups), kind.bits)
        if kind.offset == "zeros"
        else None,
        mins=halves() if kind.offset == "mins" else None,
        group_of=group_of if not kind.ordered else None,
    )


def any_order(kind: Kind, seed: int = 0) -> torch.Tensor:
    groups = -(-kind.in_features // kind.group_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, groups, (kind.in_features,), generator=generator, dtype=torch.int32)


def element(weight: GroupedInt, n: int, k: int) -> float:
    """One value, from the definition; its products and sums are rounded to float32."""
    group = k // weight.group_size if weight.group_of is None else int(weight.group_of[k])
    stream = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(weight.codes[n].tolist()))
    code = stream >> (weight.bits * k) & ((1 << weight.bits) - 1)
    scale = weight.scales[n, group].item()
    if weight.mins is not None:
        product = torch.tensor(code * scale, dtype=torch.float32)
        return float(product + weight.mins[n, group].float())
    zero = 1 << (weight.bits - 1)
    if weight.zeros is not None:
        zeros = sum(octet << (8 * place) for place, octet in enumerate(weight.zeros[n].tolist()))
        zero = zeros >> (weight.bits * group) & ((1 << weight.bits) - 1)
    return float(torch.tensor((code - zero) * scale, dtype=torch.float32))


@given(KINDS, st.integers(1, 4), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_value(kind: Kind, out_features: int, seed: int) -> None:
    weight = make(kind, out_features, seed, any_order(kind, seed))
    found = weight.dequantize()
    assert found.dtype is torch.float32
    assert found.shape == weight.shape == (out_features, kind.in_features)
    assert found.tolist() == [[element(weight, n, k) for k in range(kind.in_features)] for n in range(out_features)]


@given(KINDS, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_joined_layers_have_the_values_of_the_parts(kind: Kind, sizes: list[int], seed: int) -> None:
    order = any_order(kind, seed)
    parts = [make(kind, size, seed + i, order.clone()) for i, size in enumerate(sizes)]
    joined = GroupedInt.join(parts)
    assert joined is not None
    assert joined.features == parts[0].features
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    shared = (len(parts) - 1) * tensor_bytes(parts[0].group_of)
    assert tensor_bytes(joined) == sum(map(tensor_bytes, parts)) - shared


USUAL = Kind(4, 64, 32, "zeros", True)


@pytest.mark.parametrize(
    "changes",
    [{"bits": 8}, {"group_size": 8}, {"offset": "none"}, {"offset": "mins"}, {"ordered": False}],
)
def test_layers_of_different_kinds_are_not_joined(changes: dict[str, Any]) -> None:
    other = replace(USUAL, **changes)
    parts = [make(USUAL, 2, 0), make(other, 2, 1, any_order(other))]
    assert GroupedInt.join(parts) is None
    assert GroupedInt.join(parts[::-1]) is None


def test_layers_in_different_orders_are_not_joined() -> None:
    kind = replace(USUAL, ordered=False)
    assert GroupedInt.join([make(kind, 2, 0, any_order(kind, 0)), make(kind, 2, 0, any_order(kind, 1))]) is None


def test_scales_of_different_types_are_not_joined() -> None:
    weight = make(USUAL, 2, 0)
    assert GroupedInt.join([weight, replace(weight, scales=weight.scales.float())]) is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (USUAL, "4-bit integers, groups of 32, zero points"),
        (replace(USUAL, offset="mins"), "4-bit integers, groups of 32, minima"),
        (Kind(3, 64, 64, "none", False), "3-bit integers, groups of 64, in any order, symmetric"),
    ],
)
def test_what_it_says_of_itself(kind: Kind, words: str) -> None:
    assert str(make(kind, 2, 0, any_order(kind))) == words
