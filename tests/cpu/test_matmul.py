"""The dense matmuls against float64: bias, `out`, no tokens, views, and what they say they cannot do."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.weights.canonical import Dense, GroupedInt
from octavo.weights.interface import Activation, MatmulSpec
from octavo.weights.torch_matmul import TorchMatmul
from octavo_native_cpu.onednn import OneDNNMatmul

CPU = DeviceInfo("cpu", "CPU")
SPEC = MatmulSpec(weight=Dense, in_features=96, out_features=40, dtype=torch.bfloat16, device=CPU)
ONEDNN_REASON = OneDNNMatmul.why_not(SPEC, None)
onednn = pytest.param(
    OneDNNMatmul, torch.bfloat16, marks=pytest.mark.skipif(ONEDNN_REASON is not None, reason=str(ONEDNN_REASON))
)
MATMULS = [
    pytest.param(TorchMatmul, torch.float32),
    pytest.param(TorchMatmul, torch.bfloat16),
    onednn,
]


@dataclass(frozen=True)
class Packed:
    """A weight that no dense matmul knows."""


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T + b in float64, and the sum of the terms' sizes, which bounds the error of any order of summing."""
    x, weight = x.double(), weight.double()
    added = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return x @ weight.T + added, x.abs() @ weight.abs().T + added.abs()


def check(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Float32 sums (Higham 2002, eq. 3.5), rounded once to the dtype."""
    wanted, size = product(x, weight, bias)
    assert got.dtype is x.dtype and got.shape == wanted.shape
    error = (got.double() - wanted).abs() - 1.01 * torch.finfo(x.dtype).eps / 2 * wanted.abs()
    assert (error <= (x.shape[1] + 2) * 2.0**-24 * size).all()


@pytest.mark.parametrize("shape", [(96, 40), (576, 1536), (7, 3)])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("matmul", "dtype"), MATMULS)
def test_product(matmul: Any, dtype: torch.dtype, biased: bool, num_tokens: int, shape: tuple[int, int]) -> None:
    in_features, out_features = shape
    weight, x = (torch.randn(n, in_features).to(dtype) for n in (out_features, num_tokens))
    bias = torch.randn(out_features).to(dtype) if biased else None
    kernel = matmul()
    packed = kernel.pack(Dense(weight.clone()))
    check(kernel.apply(Activation(x), packed, bias), x, weight, bias)


@pytest.mark.parametrize(("matmul", "dtype"), MATMULS)
def test_out_is_filled_and_returned(matmul: Any, dtype: torch.dtype) -> None:
    """Also where it is a slice of a wider tensor, whose rest stays."""
    weight, x, bias = torch.randn(40, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.randn(40).to(dtype)
    kernel = matmul()
    packed = kernel.pack(Dense(weight.clone()))
    wider = torch.full((5, 64), torch.nan, dtype=dtype)
    out = wider[:, 8:48]
    got = kernel.apply(Activation(x), packed, bias, out)
    assert got.data_ptr() == out.data_ptr()
    check(out, x, weight, bias)
    assert wider[:, :8].isnan().all() and wider[:, 48:].isnan().all()


@pytest.mark.parametrize(("matmul", "dtype"), MATMULS)
def test_views(matmul: Any, dtype: torch.dtype) -> None:
    """Inputs with a row stride, and weights that are part of a larger one."""
    weight, x = torch.randn(90, 96).to(dtype)[10:50], torch.randn(5, 200).to(dtype)[:, 50:146]
    before = x.clone()
    kernel = matmul()
    packed = kernel.pack(Dense(weight))
    check(kernel.apply(Activation(x), packed, None), x, weight, None)
    assert torch.equal(x, before)


def test_torch_serves_dense_weights_anywhere() -> None:
    assert TorchMatmul.why_not(SPEC, None) is None
    assert TorchMatmul.why_not(replace(SPEC, device=DeviceInfo("cuda", "GPU", (9, 0))), None) is None
    assert Packed not in TorchMatmul.handles


def test_torch_serves_quantized_weights_on_a_gpu_alone() -> None:
    """On a CPU the loader dequantizes them once instead."""
    spec = replace(SPEC, weight=GroupedInt)
    assert "every call" in (TorchMatmul.why_not(spec, None) or "")
    assert TorchMatmul.why_not(replace(spec, device=DeviceInfo("cuda", "GPU", (9, 0))), None) is None


def test_onednn_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = OneDNNMatmul.why_not(replace(SPEC, device=DeviceInfo("cuda", "GPU", (9, 0))), None)
    assert reason is not None and "cuda" in reason
    reason = OneDNNMatmul.why_not(replace(SPEC, dtype=torch.float32), None)
    assert reason is not None and "float32" in reason
    assert OneDNNMatmul.handles == (Dense,)
    monkeypatch.setattr("octavo_native_cpu.onednn._supported", lambda: False)
    reason = OneDNNMatmul.why_not(SPEC, None)
    assert reason is not None and "lack" in reason
