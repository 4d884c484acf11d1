"""Dense weights rounded to FP8."""

import pytest
import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import ScaledFloat8
from octavo.weights.interface import LinearShape
from octavo_quant_fp8.fp8 import Fp8
from octavo_quant_fp8.online import OnlineFp8

NAME = "model.layers.1.mlp.down_proj"


def quantized(dense: torch.Tensor) -> ScaledFloat8:
    return OnlineFp8().weight(LinearShape(NAME, dense.shape[1], dense.shape[0], False), {"weight": dense}, dense.dtype)


def random_weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, some of them with no value at all."""
    torch.manual_seed(0)
    return (torch.randn(24, 96) * torch.logspace(-30, 30, 24)[:, None] * (torch.arange(24) % 5 > 0)[:, None]).to(dtype)


def test_quantizes_dense_checkpoints_only() -> None:
    assert isinstance(Fp8.quantize({}), OnlineFp8)
    assert Fp8.quantize({"quantization_config": {"quant_method": "awq"}}) is None
    assert OnlineFp8.claim({}) is None


def test_all_layers_but_the_logits() -> None:
    assert OnlineFp8().skips("lm_head")
    assert not OnlineFp8().skips(NAME)
    (spec,) = OnlineFp8().params(LinearShape(NAME, 96, 24, False))
    assert (spec.suffix, spec.shape, spec.dtypes, spec.output_axis, spec.input_axis) == ("weight", (24, 96), (), 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_half_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    """A code has three bits behind the point; below the smallest normal one, 2^-6, the steps stay as they are there."""
    dense = random_weight(dtype)
    weight = quantized(dense)
    scale = (dense.float().abs().amax(1, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    bound = 2**-4 * torch.maximum(dense.float().abs(), 2**-6 * scale)
    assert ((weight.dequantize() - dense.float()).abs() <= bound * (1 + 1e-5)).all()
    assert torch.equal(weight.scales, scale)
    assert weight.codes.dtype is torch.float8_e4m3fn and weight.granularity == "row"


def test_ties_go_to_even() -> None:
    """From 16 to 32 the steps are 2, from 256 to 448 they are 32."""
    assert quantized(torch.tensor([[448.0, 17.0, 19.0, -272.0, -304.0]])).codes.tolist() == [[448, 16, 20, -256, -320]]


def test_quantized_again_it_is_the_same() -> None:
    once = quantized(random_weight())
    again = quantized(once.dequantize())
    assert torch.equal(again.codes.view(torch.uint8), once.codes.view(torch.uint8))
    torch.testing.assert_close(again.scales, once.scales, rtol=2**-23, atol=0)


def test_layers_of_one_input_join_exactly() -> None:
    one, other = quantized(random_weight()), quantized(random_weight()[:7] * 3)
    joined = ScaledFloat8.join([one, other])
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize(), other.dequantize()]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    dense = random_weight()
    dense[3, 4] = value
    with pytest.raises(CheckpointError, match=rf"^{NAME}\.weight has values that are not finite"):
        quantized(dense)
