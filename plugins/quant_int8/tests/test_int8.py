"""Dense weights rounded to 8-bit integers."""

import pytest
import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import ScaledInt8, tensor_bytes
from octavo.weights.interface import Activation, LinearShape
from octavo.weights.torch_matmul import TorchMatmul
from octavo_quant_int8.int8 import Int8

SHAPE = LinearShape("model.layers.1.mlp.down_proj", 96, 24, False)


def quantized(dense: torch.Tensor) -> ScaledInt8:
    return Int8().weight(LinearShape(SHAPE.name, dense.shape[1], dense.shape[0], False), {"weight": dense}, dense.dtype)


def random_weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, some of them with no value at all."""
    torch.manual_seed(0)
    return (torch.randn(24, 96) * torch.logspace(-30, 30, 24)[:, None] * (torch.arange(24) % 5 > 0)[:, None]).to(dtype)


def test_quantizes_dense_checkpoints_only() -> None:
    assert isinstance(Int8.quantize({"quantization_config": None}), Int8)
    assert Int8.quantize({"quantization_config": {"quant_method": "awq"}}) is None
    assert Int8.quantize({"compression_config": {"format": "dense"}}) is None
    assert Int8.claim({"quantization_config": {"quant_method": "int8"}}) is None


def test_all_layers_but_the_logits() -> None:
    assert Int8().skips("lm_head")
    assert not Int8().skips(SHAPE.name)
    (spec,) = Int8().params(SHAPE)
    assert (spec.suffix, spec.shape, spec.dtypes, spec.output_axis, spec.input_axis) == ("weight", (24, 96), (), 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_half_a_step_of_each_row(dtype: torch.dtype) -> None:
    dense = random_weight(dtype)
    weight = quantized(dense)
    step = dense.float().abs().amax(1, keepdim=True) / 127
    assert ((weight.dequantize() - dense.float()).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(weight.scales, step.clamp(min=torch.finfo(torch.float32).tiny))
    assert (weight.codes.int().abs().amax(1) == 127 * (step[:, 0] > 0)).all()


def test_ties_go_to_even() -> None:
    assert quantized(torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, -127.0]])).codes.tolist() == [[127, 0, 2, 0, -2, -127]]


def test_quantized_again_it_is_the_same() -> None:
    once = quantized(random_weight())
    again = quantized(once.dequantize())
    assert torch.equal(again.codes, once.codes)
    torch.testing.assert_close(again.scales, once.scales, rtol=2**-23, atol=0)


def test_layers_of_one_input_join_exactly() -> None:
    one, other = quantized(random_weight()), quantized(random_weight()[:7] * 3)
    joined = ScaledInt8.join([one, other])
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize(), other.dequantize()]))


def test_apply_and_bytes() -> None:
    torch.manual_seed(1)
    weight, x = quantized(torch.randn(64, 512)), torch.randn(3, 512)
    found = TorchMatmul().apply(Activation(x), TorchMatmul().pack(weight), None)
    torch.testing.assert_close(found, x @ weight.dequantize().t())
    assert tensor_bytes(weight) == 64 * 512 + 64 * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    dense = random_weight()
    dense[3, 4] = value
    with pytest.raises(CheckpointError, match=rf"^{SHAPE.name}\.weight has values that are not finite"):
        quantized(dense)
