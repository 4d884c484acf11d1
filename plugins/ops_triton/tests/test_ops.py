"""The Triton ops against float64: in the interpreter without a GPU, compiled with one, where bfloat16 is tested too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from octavo.kv_cache.interface import KVSpec
from octavo.kv_cache.plain import PlainFormat
from octavo_ops_triton.ops import TritonOps

HAVE_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(HAVE_GPU, reason="the kernels are compiled in this process")
gpu = (pytest.mark.gpu, pytest.mark.skipif(not HAVE_GPU, reason="there is no GPU"))
PLACES = [
    pytest.param("cpu", torch.float32, marks=interpreted),
    pytest.param("cpu", torch.float16, marks=interpreted),
    *(pytest.param("cuda", dtype, marks=gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]
on_each = pytest.mark.parametrize(("device", "dtype"), PLACES)
SIZES = (0, 1, 3, 17)


@pytest.fixture(scope="module")
def ops() -> TritonOps:
    return TritonOps()


def near(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: float = 1.0) -> None:
    """Within `roundings` of half a unit in the last place, and float32's own errors."""
    assert got.dtype is dtype and got.shape == wanted.shape
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), wanted, rtol=1.01 * roundings * half + 1e-6, atol=1e-6)


def random(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Normal numbers, all there before the next kernel starts: constants must be."""
    x = (torch.randn(*shape) * 3).to(dtype).to(device)
    if device == "cuda":
        torch.cuda.synchronize()
    return x


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich 2019, eq. 4."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("width", [96, 1024])
@pytest.mark.parametrize("num_tokens", SIZES)
@on_each
def test_rms_norm(ops: TritonOps, device: str, dtype: torch.dtype, num_tokens: int, width: int) -> None:
    """Of the model's dtype, of a float32 residual, and of a view."""
    weight = random(device, dtype, width)
    for x in (
        random(device, dtype, num_tokens, width),
        random(device, torch.float32, num_tokens, width),
        random(device, dtype, num_tokens, width + 32)[:, 16:-16],
    ):
        before = x.clone()
        near(ops.rms_norm(x, weight, 1e-5), normed(x, weight, 1e-5), dtype)
        assert torch.equal(x, before)


@pytest.mark.parametrize("num_tokens", SIZES)
@on_each
def test_rms_norm_of_heads(ops: TritonOps, device: str, dtype: torch.dtype, num_tokens: int) -> None:
    """Queries and keys in a wider qkv are normed head by head; eps counts where x is small."""
    qkv, weight = random(device, dtype, num_tokens, 8, 64) / 100, random(device, dtype, 64)
    for part in (qkv[:, :5], qkv[:, 5:6]):
        near(ops.rms_norm(part, weight, 1e-2), normed(part, weight, 1e-2), dtype)


@pytest.mark.parametrize("wide_residual", [False, True])
@pytest.mark.parametrize("num_tokens", SIZES)
@on_each
def test_add_rms_norm(ops: TritonOps, device: str, dtype: torch.dtype, num_tokens: int, wide_residual: bool) -> None:
    """The sum has the reference's very bits, is written in place, and is normed as it was rounded."""
    x, weight = random(device, dtype, num_tokens, 128)[:, 16:112], random(device, dtype, 96)
    residual = random(device, torch.float32 if wide_residual else dtype, num_tokens, 96)
    before, wanted = x.clone(), residual.clone().add_(x)
    got, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert total is residual and torch.equal(total, wanted) and torch.equal(x, before)
    near(got, normed(total, weight, 1e-5), dtype)


@pytest.mark.parametrize("width", [40, 2080])
@pytest.mark.parametrize("num_tokens", SIZES)
@on_each
def test_silu_and_mul(ops: TritonOps, device: str, dtype: torch.dtype, num_tokens: int, width: int) -> None:
    """silu is rounded, and its product again; a view's stride counts, and its neighbours stay out."""
    wider = random(device, dtype, num_tokens, 2 * width + 16)
    wider[:, 2 * width :] = torch.nan
    x = wider[:, : 2 * width]
    gate, up = x.double().chunk(2, dim=-1)
    near(ops.silu_and_mul(x), gate / (1 + (-gate).exp()) * up, dtype, roundings=2.0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter
@on_each
def test_silu_of_large_numbers(ops: TritonOps, device: str, dtype: torch.dtype) -> None:
    """e^200 is infinite in float32, and silu is not."""
    x = torch.tensor([[-200.0, 200.0, 0.0, 1.0, 1.0, 1.0]], device=device).to(dtype)
    near(ops.silu_and_mul(x), torch.tensor([[0.0, 200.0, 0.0]], device=device).double(), dtype)


def table(length: int, head_dim: int, device: str) -> torch.Tensor:
    angles = torch.arange(length).double().outer(10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(device)


def turned(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Su et al. 2021, eq. 34: each pair (x[i], x[i + D/2]) is a complex number times e^(i angle)."""
    factors = torch.complex(*cos_sin[positions.long()].double().chunk(2, dim=-1)).unsqueeze(1)
    product = torch.complex(*x.double().chunk(2, dim=-1)) * factors
    return torch.cat((product.real, product.imag), dim=-1)


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 64), (9, 80), (16, 32)])
@pytest.mark.parametrize("num_tokens", SIZES)
@on_each
def test_rotary(ops: TritonOps, device: str, dtype: torch.dtype, num_tokens: int, heads: int, head_dim: int) -> None:
    """In place, in a view, its neighbours untouched, one rounding."""
    qkv = random(device, dtype, num_tokens, heads + 2, head_dim)
    before, cos_sin = qkv.clone(), table(300, head_dim, device)
    positions = torch.randint(0, 300, (num_tokens,), dtype=torch.int32).to(device)
    ops.rotary(qkv[:, :heads], positions, cos_sin)
    assert torch.equal(qkv[:, heads:], before[:, heads:])
    near(qkv[:, :heads].contiguous(), turned(before[:, :heads], positions, cos_sin), dtype)


class OtherFormat(PlainFormat):
    """The plain format under another name, so that no kernel may write it by strides."""

    layout = "other"


@pytest.mark.parametrize("cache", [PlainFormat, OtherFormat])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (12, 4), (3, 1), (1, 9)])
@on_each
def test_rotary_and_write(
    ops: TritonOps, device: str, dtype: torch.dtype, heads: int, kv_heads: int, cache: type[PlainFormat]
) -> None:
    """The turned keys, and values as they are, lie where slots say; nothing else is written, for slot -1 not at all."""
    plain = cache(KVSpec(kv_heads, 64, 16, dtype))
    raw = torch.full((6, plain.page_bytes()), 0xFF, dtype=torch.uint8, device=device)
    kv, both = plain.view(raw), heads + kv_heads
    qkv, cos_sin = random(device, dtype, 4, both + kv_heads, 64), table(99, 64, device)
    before, positions = qkv.clone(), torch.tensor([31, 32, 7, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([3 * 16 + 15, 1 * 16, -1, 4 * 16 + 5], device=device)
    ops.rotary_and_write(qkv[:, :both], qkv[:, both:], positions, cos_sin, heads, plain, kv, slots)
    near(qkv[:, :both].contiguous(), turned(before[:, :both], positions, cos_sin), dtype)
    assert torch.equal(qkv[:, both:], before[:, both:])
    expected = torch.full_like(raw, 0xFF)
    target = plain.view(expected)
    for token, (block, offset) in {0: (3, 15), 1: (1, 0), 3: (4, 5)}.items():
        target.k[block, :, offset] = qkv[token, heads:both]
        target.v[block, :, offset] = qkv[token, both:]
    first = 1 if cache is OtherFormat else 0  # that format lets slot -1 land in the null block
    assert torch.equal(raw[first:], expected[first:])


@on_each
def test_rotary_and_write_of_no_tokens(ops: TritonOps, device: str, dtype: torch.dtype) -> None:
    plain = PlainFormat(KVSpec(2, 64, 16, dtype))
    kv = plain.view(torch.zeros(2, plain.page_bytes(), dtype=torch.uint8, device=device))
    none = torch.empty(0, dtype=torch.int32, device=device)
    qk, v = torch.empty(0, 6, 64, dtype=dtype, device=device), torch.empty(0, 2, 64, dtype=dtype, device=device)
    ops.rotary_and_write(qk, v, none, table(9, 64, device), 4, plain, kv, none.long())
    assert not kv.raw.any()


def run_all(ops: TritonOps, num_tokens: int) -> list[torch.Tensor]:
    """Every op once, on numbers that depend on the number of tokens only."""
    torch.manual_seed(num_tokens)
    dtype, plain = torch.bfloat16, PlainFormat(KVSpec(2, 64, 16, torch.bfloat16))
    x, weight = random("cuda", dtype, num_tokens, 512), random("cuda", dtype, 512)
    qkv, cos_sin = random("cuda", dtype, num_tokens, 12, 64), table(64, 64, "cuda")
    positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda") % 64
    kv = plain.view(torch.zeros(9, plain.page_bytes(), dtype=torch.uint8, device="cuda"))
    slots = 16 + torch.arange(num_tokens, device="cuda")
    torch.cuda.synchronize()
    y, residual = ops.add_rms_norm(x, x.float(), weight, 1e-5)
    ops.rotary(qkv[:, :8], positions, cos_sin)
    ops.rotary_and_write(qkv[:, :10], qkv[:, 10:], positions, cos_sin, 8, plain, kv, slots)
    heads = ops.rms_norm(qkv[:, :8], weight[:64], 1e-5)
    return [y, residual, ops.rms_norm(residual, weight, 1e-5), ops.silu_and_mul(x), qkv, heads, kv.raw]


@pytest.mark.gpu
@pytest.mark.skipif(not HAVE_GPU, reason="there is no GPU")
def test_a_new_number_of_tokens_compiles_nothing(ops: TritonOps, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    run_all(ops, 5)
    compiled: list[str] = []

    def hook(**event: Any) -> None:
        compiled.append(event["repr"])

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    for num_tokens in (1, 2, 16, 33, 64):
        run_all(ops, num_tokens)
    assert compiled == []


@pytest.mark.gpu
@pytest.mark.skipif(not HAVE_GPU, reason="there is no GPU")
def test_a_chain_of_ops_repeats_in_a_graph(ops: TritonOps) -> None:
    """With programmatic launches each kernel starts before the last has ended: the bits stay those of one at a time."""
    weight = random("cuda", torch.bfloat16, 4096)
    x, start = random("cuda", torch.bfloat16, 33, 4096), random("cuda", torch.float32, 33, 4096)
    residual = torch.empty_like(start)

    def chain(pause: Callable[[], None]) -> torch.Tensor:
        y = x
        residual.copy_(start)
        for _ in range(20):
            y, _ = ops.add_rms_norm(y, residual, weight, 1e-5)
            pause()
            y = ops.silu_and_mul(torch.cat((y, y), dim=1))
            pause()
        return y

    wanted = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(lambda: None)
    for _ in range(3):
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, wanted)
