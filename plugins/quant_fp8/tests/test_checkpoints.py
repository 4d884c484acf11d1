"""FP8 checkpoints: weights that others quantized, what is stored under which name, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import ScaledFloat8, tensor_bytes
from octavo.weights.interface import Activation, LinearShape
from octavo.weights.torch_matmul import TorchMatmul
from octavo_quant_fp8.fbgemm import FbgemmFp8
from octavo_quant_fp8.fp8 import Fp8
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"
CASES = ("block", "block_ue8m0", "fbgemm_rows")
SHAPE = LinearShape("model.layers.0.self_attn.k_proj", 576, 192, False)


def claim(**quantization: Any) -> Fp8:
    claimed = Fp8.claim({"quantization_config": {"quant_method": "fp8", **quantization}})
    assert claimed is not None
    return claimed


def claim_fbgemm(**quantization: Any) -> FbgemmFp8:
    claimed = FbgemmFp8.claim({"quantization_config": {"quant_method": "fbgemm_fp8", **quantization}})
    assert claimed is not None
    return claimed


class Case:
    """A file: its tensors, the weight that its library reads, and ours."""

    def __init__(self, name: str) -> None:
        self.tensors = load_file(DATA / f"{name}.safetensors")
        self.dense = self.tensors.pop("lib_dequant")
        self.shape = LinearShape("layer", self.dense.shape[1], self.dense.shape[0], False)
        self.format: Fp8 | FbgemmFp8 = claim_fbgemm() if "rows" in name else claim(weight_block_size=[128, 128])
        self.weight = self.format.weight(self.shape, self.tensors, torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_the_files_tensors_are_those_asked_for(name: str) -> None:
    case = Case(name)
    specs = case.format.params(case.shape)
    assert {spec.suffix for spec in specs} == set(case.tensors)
    for spec in specs:
        assert case.tensors[spec.suffix].shape == spec.shape
        assert case.tensors[spec.suffix].dtype in spec.dtypes


@pytest.mark.parametrize("name", CASES)
def test_dequantized_to_the_bits_of_the_library(name: str) -> None:
    case = Case(name)
    assert type(case.weight) is ScaledFloat8
    assert torch.equal(case.weight.dequantize(), case.dense)


@pytest.mark.parametrize("name", CASES)
def test_apply_gives_the_dense_product(name: str) -> None:
    case = Case(name)
    x = torch.randn(5, case.shape.in_features, generator=torch.Generator().manual_seed(0))
    found = TorchMatmul().apply(Activation(x), TorchMatmul().pack(case.weight), torch.ones(case.shape.out_features))
    torch.testing.assert_close(found, x @ case.dense.t() + 1)


@pytest.mark.parametrize("name", CASES)
def test_resident_bytes_are_the_stored_ones(name: str) -> None:
    case = Case(name)
    stored = tensor_bytes(list(case.tensors.values()))
    assert abs(tensor_bytes(case.weight) - stored) <= 0.05 * stored


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_any_dtype(dtype: torch.dtype) -> None:
    scales = torch.tensor([[0.5, 2.0, 4.0, 1.0, 0.25], [8.0, 1.0, 2.0, 4.0, 0.125]])
    codes = torch.full((192, 576), 3.0).to(torch.float8_e4m3fn)
    params = {"weight": codes, "weight_scale_inv": scales.to(dtype)}
    weight = claim(weight_block_size=[128, 128]).weight(SHAPE, params, torch.bfloat16)
    wanted = torch.empty(192, 576)
    for n in range(192):
        for block in range(5):
            wanted[n, 128 * block : 128 * block + 128] = 3 * scales[n // 128, block]
    assert torch.equal(weight.dequantize(), wanted)


def test_blocks() -> None:
    found = claim(weight_block_size=[64, 128])
    assert {spec.suffix: spec.shape for spec in found.params(SHAPE)} == {
        "weight": (192, 576),
        "weight_scale_inv": (3, 5),
    }


@pytest.mark.parametrize("scheme", ["dynamic", "static", None])
def test_one_scale_for_the_tensor(scheme: str | None) -> None:
    found = claim(**({"activation_scheme": scheme} if scheme else {}))
    names = {spec.suffix: (spec.aliases, spec.shape) for spec in found.params(SHAPE)}
    static = {"input_scale": (("activation_scale",), ())} if scheme == "static" else {}
    assert names == {"weight": ((), (192, 576)), "weight_scale_inv": (("weight_scale",), ()), **static}
    codes = torch.full((192, 576), -3.0).to(torch.float8_e4m3fn)
    params = {"weight": codes, "weight_scale_inv": torch.tensor(0.5), "input_scale": torch.tensor(0.25)}
    weight = found.weight(SHAPE, params, torch.bfloat16)
    assert torch.equal(weight.dequantize(), torch.full((192, 576), -1.5))
    assert weight.granularity == "tensor"
    assert weight.features["input_scale"] is (scheme == "static")
    assert weight.input_scale == torch.tensor(0.25) if static else weight.input_scale is None


def test_codes_in_e5m2() -> None:
    assert claim(fmt="e5m2").params(SHAPE)[0].dtypes == (torch.float8_e5m2,)
    assert claim(fmt="e4m3").params(SHAPE)[0].dtypes == (torch.float8_e4m3fn,)


def test_tensor_scales_join_as_row_scales() -> None:
    q, k = (
        claim().weight(
            LinearShape(name, 64, out, False),
            {"weight": torch.randn(out, 64).to(torch.float8_e4m3fn), "weight_scale_inv": torch.tensor(scale)},
            torch.float32,
        )
        for name, out, scale in (("q", 96, 0.3), ("k", 32, 0.7))
    )
    joined = ScaledFloat8.join([q, k])
    assert joined is not None and joined.granularity == "row"
    assert torch.equal(joined.dequantize(), torch.cat([q.dequantize(), k.dequantize()]))


@pytest.mark.parametrize(("rows", "joins"), [(128, True), (192, False)])
def test_blocks_join_where_none_is_cut(rows: int, joins: bool) -> None:
    """A layer of 192 rows ends within a block of 128, where the next layer's would have to begin."""
    first, second = (
        claim(weight_block_size=[128, 128]).weight(
            LinearShape(name, 256, out, False),
            {
                "weight": torch.randn(out, 256).to(torch.float8_e4m3fn),
                "weight_scale_inv": torch.rand(-(-out // 128), 2),
            },
            torch.float32,
        )
        for name, out in (("q", rows), ("k", 192))
    )
    joined = ScaledFloat8.join([first, second])
    assert (joined is not None) is joins
    if joined is not None:
        assert torch.equal(joined.dequantize(), torch.cat([first.dequantize(), second.dequantize()]))


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize("make", [claim, claim_fbgemm])
def test_skipped_modules(make: Any, key: str) -> None:
    found = make(**{key: ["model.layers.0.mlp", "model.layers.1.self_attn.q_proj"]})
    skipped = ("model.layers.0.mlp", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "lm_head")
    others = ("model.layers.0", "model.layers.0.mlp2", "model.layers.1.self_attn.q_proj2", "layers.0.mlp")
    assert [found.skips(name) for name in (*skipped, *others)] == [True] * 4 + [False] * 4


def test_the_first_list_that_is_not_empty_counts() -> None:
    found = claim(ignored_layers=None, modules_to_not_convert=["a"])
    assert found.skips("a.b") and not found.skips("b")


def test_claims_its_own_only() -> None:
    for config in ({}, {"quantization_config": {"quant_method": "awq"}}, {"quantization_config": "fp8"}):
        assert Fp8.claim(config) is None
        assert FbgemmFp8.claim(config) is None
    assert FbgemmFp8.claim({"quantization_config": {"quant_method": "fp8"}}) is None
    assert Fp8.claim({"quantization_config": {"quant_method": "fbgemm_fp8"}}) is None
    assert FbgemmFp8.quantize({}) is None
    assert claim_fbgemm(activation_scale_ub=1200.0).params(SHAPE)[1].shape == (192, 1)


@pytest.mark.parametrize(
    ("quantization", "found"),
    [
        ({"activation_scheme": "token"}, "activation_scheme is 'token'"),
        ({"fmt": "e3m4"}, "fmt is 'e3m4'"),
        ({"fmt": ["e4m3"]}, "fmt is ['e4m3']"),
        ({"weight_block_size": [128]}, "weight_block_size is [128]"),
        ({"weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
        ({"weight_block_size": 128}, "weight_block_size is 128"),
        ({"weight_block_size": [128.0, 128]}, "[128.0, 128]"),
        ({"ignored_layers": "lm_head"}, "ignored_layers is 'lm_head'"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert is [1]"),
    ],
)
def test_refusals(quantization: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        claim(**quantization)
    assert found in str(caught.value)
