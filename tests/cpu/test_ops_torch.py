"""The fused operators' references against float64, on contiguous tensors and on views."""

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVSpec
from octavo.kv_cache.plain import PlainFormat
from octavo.ops.interface import OPS, OpSpec
from octavo.ops.torch_reference import TorchOps

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (0, 1, 2, 33)
ops = TorchOps()


def near(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: float = 1.0) -> None:
    """Within `roundings` of half a unit in the last place, and float32's own errors."""
    assert got.dtype is dtype
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), wanted, rtol=1.01 * roundings * half + 1e-6, atol=1e-6)


def wide(num_tokens: int, width: int, dtype: torch.dtype, view: bool) -> torch.Tensor:
    """Random numbers [T, width], a view of a wider tensor if asked."""
    return (
        (torch.randn(num_tokens, width + 24) * 3).to(dtype)[:, :width]
        if view
        else torch.randn(num_tokens, width).to(dtype)
    )


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich 2019, eq. 4."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, num_tokens: int, view: bool) -> None:
    x, weight = wide(num_tokens, 96, dtype, view), (1 + 0.3 * torch.randn(96)).to(dtype)
    before = x.clone()
    near(ops.rms_norm(x, weight, 1e-5), normed(x, weight, 1e-5), dtype)
    assert torch.equal(x, before)


def test_rms_norm_of_little_and_of_heads() -> None:
    """eps counts where x is small, and the last axis alone is the norm's."""
    x, weight = 1e-4 * torch.randn(3, 5, 16), torch.rand(16)
    got = ops.rms_norm(x, weight, 1e-2)
    near(got, normed(x, weight, 1e-2), torch.float32)
    assert got.abs().max() < 0.02


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(dtype: torch.dtype, num_tokens: int) -> None:
    """The sum is rounded as the model's dtype does, and then normed."""
    x, residual = wide(num_tokens, 96, dtype, True), wide(num_tokens, 96, dtype, False)
    weight, added = torch.rand(96).to(dtype), x.double() + residual.double()
    before = x.clone()
    got, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    near(total, added, dtype)
    near(got, normed(total, weight, 1e-5), dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype, num_tokens: int, view: bool) -> None:
    """silu is rounded, and its product again."""
    x = wide(num_tokens, 2 * 40, dtype, view)
    before = x.clone()
    gate, up = x.double().chunk(2, dim=-1)
    got = ops.silu_and_mul(x)
    assert got.shape == (num_tokens, 40)
    near(got, gate / (1 + (-gate).exp()) * up, dtype, roundings=2.0)
    assert torch.equal(x, before)


def table(length: int, head_dim: int) -> torch.Tensor:
    angles = torch.arange(length).double().outer(10000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def turned(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Su et al. 2021, eq. 34: each pair (x[i], x[i + D/2]) is a complex number times e^(i angle)."""
    factors = torch.complex(*cos_sin[positions.long()].double().chunk(2, dim=-1)).unsqueeze(1)
    product = torch.complex(*x.double().chunk(2, dim=-1)) * factors
    return torch.cat((product.real, product.imag), dim=-1)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype: torch.dtype, num_tokens: int, head_dim: int) -> None:
    """In place, in a view, its neighbours untouched, one rounding."""
    qkv = torch.randn(num_tokens, 6, head_dim).to(dtype)
    before, cos_sin = qkv.clone(), table(300, head_dim)
    positions = torch.randint(0, 300, (num_tokens,), dtype=torch.int32)
    ops.rotary(qkv[:, :4], positions, cos_sin)
    assert torch.equal(qkv[:, 4:], before[:, 4:])
    near(qkv[:, :4].contiguous(), turned(before[:, :4], positions, cos_sin), dtype)


def test_rotary_keeps_what_attention_depends_on() -> None:
    """Position 0 changes nothing, and products depend on distances only."""
    cos_sin, x = table(300, 64), torch.randn(1, 1, 64)
    q, k = x.clone(), x.flip(-1)
    ops.rotary(q, torch.tensor([0], dtype=torch.int32), cos_sin)
    assert torch.equal(q, x)
    products = []
    for base in (5, 200):
        one, two = x.clone(), k.clone()
        ops.rotary(one, torch.tensor([base + 40], dtype=torch.int32), cos_sin)
        ops.rotary(two, torch.tensor([base], dtype=torch.int32), cos_sin)
        products.append((one * two).sum().item())
    assert products[0] == pytest.approx(products[1], rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_and_write(dtype: torch.dtype) -> None:
    """Queries and keys are turned in place; the turned keys, and values as they are, are written where slots say."""
    plain = PlainFormat(KVSpec(2, 64, 16, dtype))
    kv = plain.view(torch.full((6, plain.page_bytes()), 0xFF, dtype=torch.uint8))
    qkv, cos_sin = torch.randn(3, 8, 64).to(dtype), table(99, 64)
    before, positions = qkv.clone(), torch.tensor([31, 32, 7], dtype=torch.int32)
    ops.rotary_and_write(
        qkv[:, :6], qkv[:, 6:], positions, cos_sin, 4, plain, kv, torch.tensor([3 * 16 + 15, 1 * 16, -1])
    )
    near(qkv[:, :6].contiguous(), turned(before[:, :6], positions, cos_sin), dtype)
    assert torch.equal(qkv[:, 6:], before[:, 6:])
    k, v = plain.read(kv, torch.tensor([3, 1], dtype=torch.int32), 17)
    assert torch.equal(k[15:], qkv[:2, 4:6].float()) and torch.equal(v[15:], qkv[:2, 6:].float())
    assert kv.raw[[2, 4, 5]].eq(0xFF).all()


def test_why_not() -> None:
    cpu = DeviceInfo("cpu", "CPU")
    assert set(OPS) == ops.ops
    assert [TorchOps.why_not(OpSpec(op, torch.bfloat16, cpu), None) for op in OPS] == [None] * len(OPS)
    reason = TorchOps.why_not(OpSpec("gelu", torch.bfloat16, cpu), None)
    assert reason is not None and "gelu" in reason
