"""The torch reference ops keep their interface, and the kit catches ops that do not."""

from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from octavo.kv_cache.interface import KVCache, KVCacheFormat
from octavo.ops.interface import OpSpec
from octavo.ops.torch_reference import TorchOps
from octavo.testing import FusedOpsConformance
from octavo.testing import ops as oracles

T = torch.Tensor


class TestTorchOps(FusedOpsConformance):
    ops = TorchOps
    device = "cpu"


class NoEps(TorchOps):
    def rms_norm(self, x: T, weight: T, eps: float) -> T:
        return super().rms_norm(x, weight, 0.0)


class NormOfAll(TorchOps):
    """The norm of the last two axes together."""

    def rms_norm(self, x: T, weight: T, eps: float) -> T:
        scale = x.double().square().flatten(1).mean(-1).add(eps).rsqrt().view(-1, *[1] * (x.dim() - 1))
        return (x * scale * weight).to(weight.dtype)


class RoundsTwice(TorchOps):
    """Rounds the normed numbers before the weight, as many do."""

    def rms_norm(self, x: T, weight: T, eps: float) -> T:
        return torch.rms_norm(x.float(), x.shape[-1:], None, eps).to(weight.dtype) * weight


class NarrowResidual(TorchOps):
    def add_rms_norm(self, x: T, residual: T, weight: T, eps: float) -> tuple[T, T]:
        out, total = super().add_rms_norm(x, residual, weight, eps)
        return out, total.to(x.dtype).to(total.dtype)


class NormOfXOnly(TorchOps):
    def add_rms_norm(self, x: T, residual: T, weight: T, eps: float) -> tuple[T, T]:
        return self.rms_norm(x, weight, eps), x + residual


class WrongHalf(TorchOps):
    def silu_and_mul(self, x: T) -> T:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(up) * gate


class Overflows(TorchOps):
    def silu_and_mul(self, x: T) -> T:
        gate, up = x.float().chunk(2, dim=-1)
        return (gate * gate.exp() / (1 + gate.exp()) * up).to(x.dtype)


class Overwrites(TorchOps):
    def silu_and_mul(self, x: T) -> T:
        result = super().silu_and_mul(x)
        x[:, : result.shape[1]] = result
        return result


class TurnsNeighbours(TorchOps):
    """Pairs (x[2i], x[2i + 1]), as GPT-J had them."""

    def rotary(self, x: T, positions: T, cos_sin: T) -> None:
        apart = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
        super().rotary(apart, positions, cos_sin)
        half = x.shape[-1] // 2
        x[..., ::2], x[..., 1::2] = apart[..., :half], apart[..., half:]


class OffByOne(TorchOps):
    def rotary(self, x: T, positions: T, cos_sin: T) -> None:
        super().rotary(x, (positions + 1) % len(cos_sin), cos_sin)


class WritesUnturned(TorchOps):
    def rotary_and_write(
        self,
        qk: T,
        v: T,
        positions: T,
        cos_sin: T,
        num_heads: int,
        cache_format: KVCacheFormat,
        kv: KVCache,
        slots: T,
    ) -> None:
        cache_format.write(kv, qk[:, num_heads:], v, slots)
        self.rotary(qk, positions, cos_sin)


class WritesPadding(TorchOps):
    """Takes slot -1 for the last one."""

    def rotary_and_write(
        self,
        qk: T,
        v: T,
        positions: T,
        cos_sin: T,
        num_heads: int,
        cache_format: KVCacheFormat,
        kv: KVCache,
        slots: T,
    ) -> None:
        count = kv.k.shape[0] * kv.k.shape[2]
        super().rotary_and_write(qk, v, positions, cos_sin, num_heads, cache_format, kv, slots % count)


class SaysYes(TorchOps):
    @staticmethod
    def why_not(spec: OpSpec, options: object) -> str | None:
        return None


ROWS: dict[str, Any] = {"num_tokens": 33, "width": 96}
FAULTS: list[tuple[type[TorchOps], str, dict[str, Any]]] = [
    (NoEps, "test_rms_norm_of_little", {}),
    (NormOfAll, "test_rms_norm_of_heads", {"head_dim": 64}),
    (RoundsTwice, "test_rms_norm", {**ROWS, "spare": 0, "dtype": torch.bfloat16}),
    (NarrowResidual, "test_add_rms_norm", {**ROWS, "wide": True, "dtype": torch.bfloat16}),
    (NormOfXOnly, "test_add_rms_norm", {**ROWS, "wide": False}),
    (WrongHalf, "test_silu_and_mul", {**ROWS, "spare": 0}),
    (Overflows, "test_silu_and_mul_of_large_gates", {}),
    (Overwrites, "test_silu_and_mul", {**ROWS, "spare": 24}),
    (TurnsNeighbours, "test_rotary", {"num_tokens": 33, "head_dim": 64}),
    (OffByOne, "test_rotary_at_position_0", {}),
    (WritesUnturned, "test_rotary_and_write", {"head_dim": 64, "num_heads": 4, "num_kv_heads": 1, "block_size": 16}),
    (WritesPadding, "test_rotary_and_write", {"head_dim": 64, "num_heads": 4, "num_kv_heads": 1, "block_size": 16}),
]


def _kit(spoiled: type[TorchOps]) -> Any:
    class Kit(FusedOpsConformance):
        ops: ClassVar = spoiled
        device: ClassVar = "cpu"

    return Kit()


@pytest.mark.parametrize(("spoiled", "name", "given"), FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_a_fault_is_caught(spoiled: type[TorchOps], name: str, given: dict[str, Any]) -> None:
    given = {"dtype": torch.float32, **given}
    getattr(_kit(TorchOps), name)(**given)
    with pytest.raises(AssertionError):
        getattr(_kit(spoiled), name)(**given)


def test_an_op_that_is_not_offered_is_to_be_refused() -> None:
    with pytest.raises(AssertionError, match="why_not accepts gelu_of_nobody"):
        _kit(SaysYes).test_offers_known_ops_only()


def test_the_oracles_are_torchs() -> None:
    """Norm and activation in float64; rotary by complex numbers."""
    x, weight = torch.randn(5, 96, dtype=torch.float64), torch.rand(96, dtype=torch.float64)
    torch.testing.assert_close(oracles.rms_norm(x, weight, 1e-3).value, F.rms_norm(x, (96,), weight, 1e-3))
    torch.testing.assert_close(oracles.silu_and_mul(x).value, F.silu(x[:, :48]) * x[:, 48:])
    heads, positions, cos_sin = torch.randn(4, 2, 64), torch.tensor([0, 3, 77, 98]), oracles.rotary_table(99, 64)
    factors = torch.complex(*cos_sin[positions].double().chunk(2, dim=-1)).unsqueeze(1)
    product = torch.complex(*heads.double().chunk(2, dim=-1)) * factors
    wanted = torch.cat((product.real, product.imag), dim=-1)
    torch.testing.assert_close(oracles.rotary(heads, positions, cos_sin).value, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_unit_too_much_is_an_error(dtype: torch.dtype) -> None:
    """The right value rounded to the dtype passes; its second neighbour does not."""
    value = torch.rand(200, dtype=torch.float64) + 1
    wanted = oracles.rounded(value, 0.0, dtype)
    oracles.assert_near(value.to(dtype), wanted, "it")
    off = value.to(dtype) * (1 + 2 * torch.finfo(dtype).eps)
    with pytest.raises(AssertionError, match="200 of 200 elements are wrong"):
        oracles.assert_near(off, wanted, "it")
