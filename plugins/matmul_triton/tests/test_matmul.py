"""The few-token kernels against float64: in the interpreter without a GPU, compiled with one."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from octavo.weights.canonical import Dense
from octavo.weights.interface import Activation
from octavo_matmul_triton.candidates import TOKENS, candidates
from octavo_matmul_triton.matmul import FewTokens, TritonMatmul
from octavo_matmul_triton.tuning import Rule, TensorCore, Vector

HAVE_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(HAVE_GPU, reason="the kernels are compiled in this process")
gpu = (pytest.mark.gpu, pytest.mark.skipif(not HAVE_GPU, reason="there is no GPU"))
on_gpu = [pytest.param("cuda", dtype, marks=gpu) for dtype in (torch.float16, torch.bfloat16)]
PLACES = [
    pytest.param("cpu", torch.float32, marks=interpreted),
    pytest.param("cpu", torch.float16, marks=interpreted),
    pytest.param("cuda", torch.float32, marks=gpu),
    *on_gpu,
]
on_each = pytest.mark.parametrize(("device", "dtype"), PLACES)

# Few outputs and more tiles than K fills, so that every mask is met: 70 outputs, K of 272.
VECTORS: Rule = {1: Vector(4, 1), 2: Vector(8, 2), 4: Vector(2, 1, unroll=2, prefetch=0)}
TENSOR_CORES: dict[str, TensorCore] = {
    "plain": TensorCore(32, 64, num_stages=2),
    "split": TensorCore(16, 32, num_stages=3, splits=3),
    "swapped": TensorCore(64, 32, num_stages=3, swap=True),
    "swapped and split": TensorCore(64, 64, num_stages=2, splits=2, swap=True, prefetch=0),
}


@dataclass(frozen=True)
class Case:
    """A product's operands, settled on the device before any kernel may read them."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def random(cls, device: str, dtype: torch.dtype, tokens: int, outputs: int = 70, width: int = 272) -> "Case":
        torch.manual_seed(tokens)
        tensors = [torch.randn(shape).to(dtype).to(device) for shape in ((tokens, width), (outputs, width), (outputs,))]
        if device == "cuda":
            torch.cuda.synchronize()
        return cls(*tensors)


def check(got: torch.Tensor, case: Case, bias: torch.Tensor | None) -> None:
    """Float32 sums (Higham 2002, eq. 3.5), rounded once to the dtype."""
    x, weight = case.x.double(), case.weight.double()
    added = torch.zeros_like(case.bias).double() if bias is None else bias.double()
    wanted, size = x @ weight.T + added, x.abs() @ weight.abs().T + added.abs()
    assert got.dtype is case.x.dtype and got.shape == wanted.shape
    error = (got.double() - wanted).abs() - 1.01 * torch.finfo(got.dtype).eps / 2 * wanted.abs()
    assert (error <= (x.shape[1] + 2) * 2.0**-24 * size).all()


def product(rule: Rule, case: Case, bias: torch.Tensor | None, out: torch.Tensor | None = None) -> torch.Tensor:
    matmul = FewTokens(rule=rule)
    return matmul.apply(Activation(case.x), matmul.pack(Dense(case.weight)), bias, out)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4])
@on_each
def test_vector_kernel(device: str, dtype: torch.dtype, tokens: int, biased: bool) -> None:
    case = Case.random(device, dtype, tokens)
    bias = case.bias if biased else None
    check(product(VECTORS, case, bias), case, bias)


@pytest.mark.parametrize("kind", TENSOR_CORES)
@pytest.mark.parametrize("tokens", [5, 16, 33])
@pytest.mark.parametrize(("device", "dtype"), [*PLACES[:2], *on_gpu])
def test_tensor_core_kernel(device: str, dtype: torch.dtype, tokens: int, kind: str) -> None:
    case = Case.random(device, dtype, tokens)
    rule = dict.fromkeys((8, 16, 32, 64), TENSOR_CORES[kind])
    for bias in (None, case.bias):
        check(product(rule, case, bias), case, bias)


@pytest.mark.parametrize(("outputs", "width"), [(1, 16), (3, 1024), (130, 512)])
@on_each
def test_default_rule(device: str, dtype: torch.dtype, outputs: int, width: int) -> None:
    """Through the provider itself: two tokens by the kernel, seven by torch."""
    for tokens in (2, 7):
        case, matmul = Case.random(device, dtype, tokens, outputs, width), TritonMatmul()
        packed = matmul.pack(Dense(case.weight))
        check(matmul.apply(Activation(case.x), packed, case.bias), case, case.bias)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@on_each
def test_out_is_filled_and_returned(device: str, dtype: torch.dtype, tokens: int) -> None:
    """Also where it is a slice of a wider tensor, whose rest stays."""
    case = Case.random(device, dtype, tokens)
    wider = torch.full((tokens, 96), torch.nan, dtype=dtype, device=device)
    out = wider[:, 9:79]
    rule = {**VECTORS, 8: TENSOR_CORES["plain"], 16: TENSOR_CORES["split"]} if dtype.itemsize == 2 else VECTORS
    matmul = FewTokens(rule=rule) if tokens <= max(rule) else TritonMatmul()
    got = matmul.apply(Activation(case.x), matmul.pack(Dense(case.weight)), case.bias, out)
    assert got.data_ptr() == out.data_ptr()
    check(out, case, case.bias)
    assert wider[:, :9].isnan().all() and wider[:, 79:].isnan().all()


@on_each
def test_views(device: str, dtype: torch.dtype) -> None:
    """Inputs with a row stride, and weights that are part of a larger one."""
    whole = Case.random(device, dtype, 3, outputs=90, width=400)
    view = Case(whole.x[:, 50:322], whole.weight[10:80, 100:372], whole.bias[10:80])
    check(product(VECTORS, view, view.bias), view, view.bias)


@pytest.mark.gpu
@pytest.mark.skipif(not HAVE_GPU, reason="there is no GPU")
@pytest.mark.parametrize("tokens", TOKENS)
def test_candidates(tokens: int) -> None:
    """What `tune` may pin, with outputs that fill no tile and the width that most shapes have."""
    case = Case.random("cuda", torch.bfloat16, tokens, outputs=1000, width=4096)
    for config in candidates(tokens):
        check(product({tokens: config}, case, case.bias), case, case.bias)


@pytest.mark.gpu
@pytest.mark.skipif(not HAVE_GPU, reason="there is no GPU")
def test_a_new_number_of_tokens_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `pack`: neither do a bias, other outputs of the same width, or an unaligned `out`."""
    from triton import knobs

    rule = {**VECTORS, 8: TENSOR_CORES["plain"], 16: TENSOR_CORES["split"], 32: TENSOR_CORES["swapped"]}
    matmul = FewTokens(rule=rule)
    case = Case.random("cuda", torch.bfloat16, 32)
    packed = matmul.pack(Dense(case.weight))
    compiled: list[str] = []

    def hook(**event: Any) -> None:
        compiled.append(event["repr"])

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    for tokens in range(1, 33):
        matmul.apply(Activation(case.x[:tokens]), packed, case.bias if tokens % 2 else None)
        matmul.apply(Activation(case.x[:tokens]), packed, None, torch.empty_like(case.x)[:tokens, 1:71])
    matmul.apply(Activation(case.x), matmul.pack(Dense(case.weight[:33])), None)
    assert compiled == []


@interpreted
def test_a_weight_that_is_not_aligned_is_moved() -> None:
    """Bulk prefetches need 16 bytes."""
    flat = torch.randn(16 * 4 + 1)
    weight = flat[1:].view(4, 16)
    packed = FewTokens(rule=VECTORS).pack(Dense(weight))
    assert weight.data_ptr() % 16 and packed.data_ptr() % 16 == 0 and torch.equal(packed, weight)
