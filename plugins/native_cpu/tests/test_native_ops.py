"""The fused ops keep their interface, round as torch's reference rounds, and give the same bits with any threads."""

from collections.abc import Callable

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache, KVSpec
from octavo.kv_cache.plain import PlainFormat
from octavo.ops.interface import OPS, OpSpec
from octavo.ops.torch_reference import TorchOps
from octavo.testing import FusedOpsConformance
from octavo.testing.ops import rotary_table
from octavo_native_cpu.build import built
from octavo_native_cpu.ops import MANY_ELEMENTS, NativeOps

pytestmark = pytest.mark.skipif(built().library is None, reason=f"{built().reason}")

DTYPES = (torch.float32, torch.bfloat16)


class TestNativeOps(FusedOpsConformance):
    ops = NativeOps
    device = "cpu"
    dtypes = DTYPES
    nums_tokens = (1, 33)


class ShiftedFormat(PlainFormat):
    """Plain pages under another name, with 1 added to all values."""

    layout = "shifted"

    def write(self, kv: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        super().write(kv, k, v + 1, slots)


def near_torch(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Torch's bits in bfloat16 but for rare ties; in float32 some units apart."""
    if got.dtype is torch.bfloat16:
        assert (got != wanted).float().mean() < 5e-3
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=2**-7 if got.dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_torch_rounds_likewise(dtype: torch.dtype, num_tokens: int) -> None:
    native, reference = NativeOps(), TorchOps()
    x, residual = torch.randn(num_tokens, 576).to(dtype), torch.randn(num_tokens, 576)
    weight = torch.randn(576).to(dtype)
    (got, total), (wanted, sums) = (ops.add_rms_norm(x, residual.clone(), weight, 1e-5) for ops in (native, reference))
    near_torch(got, wanted)
    assert torch.equal(total, sums)
    near_torch(native.rms_norm(total, weight, 1e-5), wanted)
    gated = (torch.randn(num_tokens, 2 * 1536) * 4).to(dtype)
    near_torch(native.silu_and_mul(gated), reference.silu_and_mul(gated))
    heads, positions = torch.randn(num_tokens, 12, 64).to(dtype), torch.randint(500, (num_tokens,), dtype=torch.int32)
    turned = heads.clone()
    native.rotary(turned, positions, rotary_table(500, 64))
    reference.rotary(heads, positions, rotary_table(500, 64))
    near_torch(turned, heads)


def test_bfloat16_rounds_to_even_and_keeps_nan() -> None:
    """1 + 2^-8 and 1 + 3 * 2^-8 lie between two numbers: the even one is taken; NaN and infinity stay."""
    x = torch.tensor([[1.0, 1.0, torch.nan, torch.inf]], dtype=torch.bfloat16)
    residual = torch.tensor([[2.0**-8, 3 * 2.0**-8, 0.0, 0.0]], dtype=torch.bfloat16)
    _, total = NativeOps().add_rms_norm(x, residual, torch.ones(4, dtype=torch.bfloat16), 1e-5)
    assert total[0, :2].tolist() == [1.0, 1.015625]
    assert total[0, 2].isnan() and total[0, 3].isinf()


def test_exponential_is_as_exact_as_it_says() -> None:
    """silu(x) / x = 1 / (1 + e^-x): the error of e^-x, at most 3 units, and those of a sum and two products."""
    x = torch.linspace(-85, 85, 1 << 18)
    got = NativeOps().silu_and_mul(torch.cat((x, torch.ones_like(x))).view(1, -1))[0]
    wanted = x.double() * torch.sigmoid(x.double())
    assert ((got.double() - wanted).abs() <= 6 * 2.0**-24 * wanted.abs()).all()


def _calls(dtype: torch.dtype) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Each op on enough numbers for threads."""
    count, ops = MANY_ELEMENTS // 576 + 9, NativeOps()
    x, residual = torch.randn(count, 576).to(dtype), torch.randn(count, 576)
    weight, gated = torch.randn(576).to(dtype), torch.randn(count, 2 * 999).to(dtype)
    qkv, positions = torch.randn(count, 15, 64).to(dtype), torch.randint(500, (count,), dtype=torch.int32)
    cache_format = PlainFormat(KVSpec(3, 64, 16, dtype))
    slots = torch.randperm(16 * count)[:count]

    def write() -> list[torch.Tensor]:
        turned, raw = qkv.clone(), torch.zeros(count, cache_format.page_bytes(), dtype=torch.uint8)
        kv = cache_format.view(raw)
        ops.rotary_and_write(
            turned[:, :12], turned[:, 12:], positions, rotary_table(500, 64), 9, cache_format, kv, slots
        )
        return [turned, raw]

    return {
        "rms_norm": lambda: [ops.rms_norm(residual, weight, 1e-5)],
        "add_rms_norm": lambda: [*ops.add_rms_norm(x, residual.clone(), weight, 1e-5)],
        "silu_and_mul": lambda: [ops.silu_and_mul(gated)],
        "rotary_and_write": write,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    for name, call in _calls(dtype).items():
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), name


def test_another_layout_is_written_by_its_format() -> None:
    spec = KVSpec(1, 32, 8, torch.float32)
    cache_format = ShiftedFormat(spec)
    kv = cache_format.view(torch.zeros(3, cache_format.page_bytes(), dtype=torch.uint8))
    qkv = torch.randn(2, 4, 32)
    slots = torch.tensor([9, 17])
    NativeOps().rotary_and_write(
        qkv[:, :3], qkv[:, 3:], torch.tensor([0, 5], dtype=torch.int32), rotary_table(8, 32), 2, cache_format, kv, slots
    )
    assert torch.equal(kv.k[[1, 2], 0, 1], qkv[:, 2])
    assert torch.equal(kv.v[[1, 2], 0, 1], qkv[:, 3] + 1)


def test_why_not() -> None:
    cpu = DeviceInfo("cpu", "CPU")
    assert [NativeOps.why_not(OpSpec(op, torch.bfloat16, cpu), None) for op in OPS] == [None] * len(OPS)
    assert "float16" in str(NativeOps.why_not(OpSpec("rotary", torch.float16, cpu), None))
    assert "cuda" in str(NativeOps.why_not(OpSpec("rotary", torch.bfloat16, DeviceInfo("cuda", "GPU")), None))
