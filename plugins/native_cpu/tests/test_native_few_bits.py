"""Products of 4-bit and 8-bit weights against float64: edges, bias, `out`, views, and what they say they cannot do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.weights.bits import pack_octets
from octavo.weights.canonical import GroupedInt, ScaledInt8, tensor_bytes
from octavo.weights.interface import Activation, MatmulSpec
from octavo_native_cpu.few_bits import Int4Matmul, Int8Matmul

CPU = DeviceInfo("cpu", "CPU")
HALF_UNIT = torch.finfo(torch.bfloat16).eps / 2  # the largest relative error of a rounding
NUMS_TOKENS = [0, 1, 3, 8, 33]


def grouped(out_features: int, in_features: int, group_size: int, kind: str, bits: int = 4) -> GroupedInt:
    """A random weight; codes are any words."""
    words, groups = -(-in_features * bits // 32), -(-in_features // group_size)
    return GroupedInt(
        bits=bits,
        in_features=in_features,
        group_size=group_size,
        codes=torch.randint(-(2**31), 2**31 - 1, (out_features, words), dtype=torch.int32),
        scales=(torch.rand(out_features, groups) * 0.02 + 0.001).half(),
        zeros=pack_octets(torch.randint(0, 16, (out_features, groups)), 4) if kind == "zeros" else None,
        mins=(torch.rand(out_features, groups) * -0.3).half() if kind == "mins" else None,
    )


def scaled(out_features: int, in_features: int, by_row: bool = True) -> ScaledInt8:
    block = (1 if by_row else out_features, in_features)
    codes = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    return ScaledInt8(codes=codes, scales=torch.rand(out_features if by_row else 1, 1) * 0.01 + 0.001, block=block)


def sizes(weight: Any) -> torch.Tensor:
    """What an element's rounding is relative to: the terms of (code - 8) * scale + zero."""
    if isinstance(weight, ScaledInt8):
        return weight.dequantize().double().abs()
    scale = weight.scales.double()
    zero = (weight.mins.double() + 8 * scale) if weight.mins is not None else torch.zeros_like(scale)
    if weight.zeros is not None:
        zero = (8 - weight.zero_points().double()) * scale
    spread = [one.abs().repeat_interleave(weight.group_size, 1) for one in (scale, zero)]
    return (weight.dequantize().double() - zero.repeat_interleave(weight.group_size, 1)).abs() + spread[1]


def check(got: torch.Tensor, x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> None:
    """Scales rounded once, sums in float32 (Higham 2002, eq. 3.5), the product and the biased sum rounded once each."""
    wanted = x.double() @ weight.dequantize().double().T
    total = wanted if bias is None else wanted + bias.double()
    assert got.dtype is x.dtype and got.shape == total.shape
    terms = x.double().abs() @ sizes(weight).T
    bound = HALF_UNIT * (1.02 * (wanted.abs() + total.abs()) + 1.01 * terms) + (x.shape[1] + 4) * 2.0**-23 * terms
    assert ((got.double() - total).abs() <= bound).all()


WEIGHTS = {
    "zeros": (Int4Matmul, lambda: grouped(80, 192, 64, "zeros")),
    "mins": (Int4Matmul, lambda: grouped(64, 96, 32, "mins")),
    "symmetric": (Int4Matmul, lambda: grouped(144, 1536, 128, "symmetric")),
    "wide groups": (Int4Matmul, lambda: grouped(16, 576, 576, "zeros")),
    "narrow": (Int4Matmul, lambda: grouped(192, 512, 256, "symmetric")),
    "rows": (Int8Matmul, lambda: scaled(77, 48)),
    "tensor": (Int8Matmul, lambda: scaled(3, 592, by_row=False)),
    "one output": (Int8Matmul, lambda: scaled(1, 16)),
}
each_weight = pytest.mark.parametrize("kind", WEIGHTS)


@each_weight
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_tokens", NUMS_TOKENS)
def test_product(kind: str, num_tokens: int, biased: bool) -> None:
    matmul, make = WEIGHTS[kind]
    weight = make()
    x = torch.randn(num_tokens, weight.shape[1]).bfloat16()
    bias = torch.randn(weight.shape[0]).bfloat16() if biased else None
    kernel = matmul()
    check(kernel.apply(Activation(x), kernel.pack(weight), bias), x, weight, bias)


@each_weight
def test_errors_are_of_the_size_of_a_dense_products(kind: str) -> None:
    """Root mean squares, beside the dense product of the dequantized weight in bfloat16."""
    matmul, make = WEIGHTS[kind]
    weight = make()
    x = torch.randn(256, weight.shape[1]).bfloat16()
    wanted = x.double() @ weight.dequantize().double().T
    kernel = matmul()
    got = kernel.apply(Activation(x), kernel.pack(weight), None)
    dense = torch.nn.functional.linear(x, weight.dequantize().bfloat16())
    error, usual = ((one.double() - wanted).square().mean().sqrt() for one in (got, dense))
    assert error < 2 * usual


def test_scales_of_few_digits_lose_nothing() -> None:
    """Zero points and codes are exact: powers of two and whole inputs give the exact product."""
    weight = replace(grouped(64, 64, 32, "zeros"), scales=2.0 ** torch.randint(-3, 3, (64, 2)))
    x = torch.eye(64).bfloat16()
    kernel = Int4Matmul()
    got = kernel.apply(Activation(x), kernel.pack(weight), None)
    assert torch.equal(got.float().T, weight.dequantize())


@each_weight
def test_views_and_out(kind: str) -> None:
    """Inputs with strides or from odd places, and `out` in the middle of a wider tensor, whose rest stays."""
    matmul, make = WEIGHTS[kind]
    weight = make()
    out_features, in_features = weight.shape
    kernel = matmul()
    packed = kernel.pack(weight)
    strided = torch.randn(5, in_features + 40).bfloat16()[:, 3 : 3 + in_features]
    odd = torch.randn(5 * in_features + 1).bfloat16()[1:].view(5, in_features)
    for x in (strided, odd):
        wider = torch.full((5, out_features + 16), torch.nan, dtype=torch.bfloat16)
        out = wider[:, 8:-8]
        assert kernel.apply(Activation(x), packed, None, out).data_ptr() == out.data_ptr()
        check(out, x, weight)
        assert wider[:, :8].isnan().all() and wider[:, -8:].isnan().all()


def test_codes_from_an_odd_place() -> None:
    """As they lie in a mapped file: the 8-bit kernel would fault."""
    weight = scaled(40, 96)
    moved = torch.empty(40 * 96 + 1, dtype=torch.int8)[1:].view(40, 96).copy_(weight.codes)
    weight = ScaledInt8(codes=moved, scales=weight.scales, block=weight.block)
    x = torch.randn(3, 96).bfloat16()
    check(Int8Matmul().apply(Activation(x), Int8Matmul().pack(weight), None), x, weight)


def test_joined_layers() -> None:
    """Layers side by side, as queries, keys and values are: scales by tensor become scales by row."""
    parts = [scaled(48, 64, by_row=False), scaled(16, 64, by_row=False)]
    joined = ScaledInt8.join(parts)
    assert joined is not None
    x = torch.randn(2, 64).bfloat16()
    check(Int8Matmul().apply(Activation(x), Int8Matmul().pack(joined), None), x, joined)


def test_packed_weights_are_small() -> None:
    dense = 576 * 1536 * 2
    assert tensor_bytes(Int4Matmul().pack(grouped(576, 1536, 64, "zeros"))) == dense / 4 + 576 * 24 * 2 * 2
    assert tensor_bytes(Int8Matmul().pack(scaled(576, 1536))) == dense / 2 + 576 * 2


INT4 = MatmulSpec(
    weight=GroupedInt,
    in_features=576,
    out_features=192,
    dtype=torch.bfloat16,
    device=CPU,
    features={"bits": 4, "group_size": 64},
)
INT8 = replace(INT4, weight=ScaledInt8, features={"scales": "row"})


@pytest.mark.parametrize(
    ("matmul", "spec", "reason"),
    [
        (Int4Matmul, replace(INT4, device=DeviceInfo("cuda", "GPU", (9, 0))), "runs on a CPU, not on cuda"),
        (Int4Matmul, replace(INT4, dtype=torch.float32), "in bfloat16, not in float32"),
        (Int4Matmul, replace(INT4, features={"bits": 3, "group_size": 64}), "4 bits, not of 3"),
        (Int4Matmul, replace(INT4, out_features=200), "multiple of 16 outputs, not 200"),
        (Int4Matmul, replace(INT4, in_features=600), "not 600 inputs by 64"),
        (Int4Matmul, replace(INT4, features={"bits": 4, "group_size": 16}), "not 576 inputs by 16"),
        (Int8Matmul, replace(INT8, dtype=torch.float16), "in bfloat16, not in float16"),
        (Int8Matmul, replace(INT8, features={"scales": "block", "block": (128, 128)}), "not blocks"),
        (Int8Matmul, replace(INT8, in_features=600), "multiple of 16 inputs, not 600"),
    ],
)
def test_reasons(matmul: Any, spec: MatmulSpec, reason: str) -> None:
    assert reason in (matmul.why_not(spec, None) or "")


def test_what_fits() -> None:
    assert Int4Matmul.why_not(INT4, None) is None
    assert Int4Matmul.why_not(replace(INT4, features={"bits": 4, "group_size": 576}), None) is None
    assert Int8Matmul.why_not(INT8, None) is None
    assert not {"group_of"} & Int4Matmul.features and not {"block"} & Int8Matmul.features
