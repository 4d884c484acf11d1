"""The fused ops' interface as tests: subclass FusedOpsConformance, and set `ops`. Needs pytest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from octavo.kv_cache.interface import KVCacheFormat, KVSpec
from octavo.kv_cache.plain import PlainFormat
from octavo.ops.interface import OPS, FusedOps, OpSpec
from octavo.testing import ops as oracles
from octavo.testing.attention import POISON
from octavo.testing.conformance import Conformance
from octavo.testing.gpu import captured, no_synchronisation
from octavo.testing.ops import assert_near

_EPS = 1e-5
_LENGTH = 4096  # positions of the rotary table
_SPARE = 24  # columns beside a view; a multiple of 16 bytes in every dtype

Calls = dict[str, Callable[[], list[torch.Tensor]]]


@dataclass(frozen=True, slots=True)
class _Written:
    """A rotary_and_write's tensors: `qk` and `v` are views of `qkv`, `k_heads` those of qk's heads that are keys."""

    qkv: torch.Tensor
    qk: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    cos_sin: torch.Tensor
    num_heads: int
    cache_format: KVCacheFormat
    raw: torch.Tensor
    slots: torch.Tensor


class FusedOpsConformance(Conformance):
    """Every op that `ops` offers, against float64; a test of an op that it does not offer or refuses is skipped.

    `widths` are sizes of the last axis, `nums_tokens` numbers of tokens.
    """

    ops: ClassVar[type[FusedOps]]
    options: ClassVar[Any] = None
    cache_format: ClassVar[type[KVCacheFormat]] = PlainFormat
    widths: ClassVar[Sequence[int]] = (64, 96, 896, 4096)
    nums_tokens: ClassVar[Sequence[int]] = (1, 2, 33)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test that takes a `width` or `num_tokens` with all of them."""
        super().pytest_generate_tests(metafunc)
        for name, values in (("width", self.widths), ("num_tokens", self.nums_tokens)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values)

    # -- inputs -----------------------------------------------------------------------------------------------------

    def built(self, op: str, dtype: torch.dtype) -> FusedOps:
        """The ops; skips the test where they do not offer `op` or refuse it."""
        reason = self._refusal(op, dtype)
        if reason is not None:
            pytest.skip(f"The ops refuse: {reason}.")
        ops: Any = self.ops
        built: FusedOps = ops(self.options)
        return built

    def _refusal(self, op: str, dtype: torch.dtype) -> str | None:
        if op not in self.ops.ops:
            return f"they do not offer {op}"
        return self.ops.why_not(OpSpec(op, dtype, self.device_info), self.options)

    def random(self, *shape: int, dtype: torch.dtype, size: float = 1.0, spare: int = 0, seed: int = 0) -> torch.Tensor:
        """Normal numbers times `size`, made on the CPU; with `spare` a view of a tensor with so many columns more."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.randn(*shape[:-1], shape[-1] + spare, generator=generator) * size
        return wide.to(dtype).to(self.device_info.torch_device)[..., : shape[-1]]

    def weight(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """A norm's weight, around 1."""
        return 1 + self.random(width, dtype=dtype, size=0.3, seed=9)

    def positions(self, num_tokens: int) -> torch.Tensor:
        """Positions [T] int32 over all of the rotary table, both ends included."""
        generator = torch.Generator().manual_seed(1)
        positions = torch.randint(0, _LENGTH, (num_tokens,), generator=generator, dtype=torch.int32)
        positions[:2] = torch.tensor([_LENGTH - 1, 0])[:num_tokens]
        return positions.to(self.device_info.torch_device)

    def table(self, head_dim: int) -> torch.Tensor:
        """cos_sin on the device."""
        return oracles.rotary_table(_LENGTH, head_dim).to(self.device_info.torch_device)

    # -- what is offered --------------------------------------------------------------------------------------------

    def test_offers_known_ops_only(self) -> None:
        """The core calls those in OPS, and asks `why_not` about all of them."""
        assert self.ops.ops <= set(OPS), f"unknown: {sorted(self.ops.ops - set(OPS))}"
        for op in {*OPS, "gelu_of_nobody"} - self.ops.ops:
            reason = self.ops.why_not(OpSpec(op, self.dtypes[0], self.device_info), self.options)
            assert reason, f"why_not accepts {op}, which is not offered"

    def test_serves_some_dtype(self) -> None:
        """Each op that is offered is served in at least one of `dtypes`."""
        for op in self.ops.ops:
            reasons = [self._refusal(op, dtype) for dtype in self.dtypes]
            assert None in reasons, f"{op} is refused in every dtype: {reasons}"

    # -- norms ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("spare", [0, _SPARE])
    def test_rms_norm(self, dtype: torch.dtype, width: int, num_tokens: int, spare: int) -> None:
        """Of contiguous tensors and of views, which are left alone."""
        ops = self.built("rms_norm", dtype)
        x, weight = self.random(num_tokens, width, dtype=dtype, size=3.0, spare=spare), self.weight(width, dtype)
        before = x.clone()
        got = ops.rms_norm(x, weight, _EPS)
        assert got.dtype is dtype
        assert_near(got, oracles.rms_norm(before, weight, _EPS), "rms_norm")
        assert torch.equal(x, before), "rms_norm wrote to x"

    def test_rms_norm_of_the_residual(self, dtype: torch.dtype, width: int) -> None:
        """x may be float32 beside a narrower weight, whose dtype the result has."""
        ops = self.built("rms_norm", dtype)
        x, weight = self.random(5, width, dtype=torch.float32, size=40.0), self.weight(width, dtype)
        got = ops.rms_norm(x, weight, _EPS)
        assert got.dtype is dtype
        assert_near(got, oracles.rms_norm(x, weight, _EPS), "rms_norm")

    @pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
    def test_rms_norm_of_heads(self, dtype: torch.dtype, head_dim: int) -> None:
        """The last axis alone is the norm's: x [T, heads, D], some heads of a wider tensor."""
        ops = self.built("rms_norm", dtype)
        x, weight = self.random(9, 7, head_dim, dtype=dtype)[:, 2:5], self.weight(head_dim, dtype)
        assert_near(ops.rms_norm(x, weight, _EPS), oracles.rms_norm(x, weight, _EPS), "rms_norm of heads")

    def test_rms_norm_of_little(self, dtype: torch.dtype) -> None:
        """eps counts where x is small, and zeros stay zeros."""
        ops = self.built("rms_norm", dtype)
        x, weight = self.random(3, 96, dtype=dtype, size=1e-3), self.weight(96, dtype)
        x[1] = 0
        got = ops.rms_norm(x, weight, 1e-2)
        assert_near(got, oracles.rms_norm(x, weight, 1e-2), "rms_norm of little")
        assert not got[1].any()

    @pytest.mark.parametrize("wide", [False, True])
    def test_add_rms_norm(self, dtype: torch.dtype, width: int, num_tokens: int, wide: bool) -> None:
        """The sum has the residual's dtype (the model's, or float32), the norm is of that sum, x is left alone."""
        ops = self.built("add_rms_norm", dtype)
        x = self.random(num_tokens, width, dtype=dtype, spare=_SPARE)
        residual = self.random(num_tokens, width, dtype=torch.float32 if wide else dtype, size=4.0, seed=1)
        weight, before, wanted = self.weight(width, dtype), x.clone(), oracles.added(x, residual)
        got, total = ops.add_rms_norm(x, residual, weight, _EPS)
        assert (got.dtype, total.dtype) == (dtype, residual.dtype)
        assert_near(total, wanted, "the residual")
        assert_near(got, oracles.rms_norm(total, weight, _EPS), "add_rms_norm")
        assert torch.equal(x, before), "add_rms_norm wrote to x"

    # -- activation -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("spare", [0, _SPARE])
    def test_silu_and_mul(self, dtype: torch.dtype, width: int, num_tokens: int, spare: int) -> None:
        """The gate is the first half; x is left alone."""
        ops = self.built("silu_and_mul", dtype)
        x = self.random(num_tokens, 2 * width, dtype=dtype, size=3.0, spare=spare)
        before = x.clone()
        got = ops.silu_and_mul(x)
        assert got.dtype is dtype
        assert_near(got, oracles.silu_and_mul(before), "silu_and_mul")
        assert torch.equal(x, before), "silu_and_mul wrote to x"

    def test_silu_and_mul_of_large_gates(self, dtype: torch.dtype) -> None:
        """Where exp overflows: silu of a large negative gate is 0, of a large positive one the gate."""
        ops = self.built("silu_and_mul", dtype)
        x = self.random(4, 128, dtype=dtype)
        x[:, :6] = torch.tensor([-3e4, -200.0, -89.0, 89.0, 200.0, 3e4], dtype=dtype)
        x[:, 64:70] = 0.5
        assert_near(ops.silu_and_mul(x), oracles.silu_and_mul(x), "silu_and_mul of large gates")

    # -- rotary -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
    def test_rotary(self, dtype: torch.dtype, num_tokens: int, head_dim: int) -> None:
        """In place, some heads of a tensor; the other heads stay as they are. Halves are pairs, not neighbours."""
        ops = self.built("rotary", dtype)
        qkv = self.random(num_tokens, 6, head_dim, dtype=dtype)
        before, positions, cos_sin = qkv.clone(), self.positions(num_tokens), self.table(head_dim)
        ops.rotary(qkv[:, :4], positions, cos_sin)
        assert torch.equal(qkv[:, 4:], before[:, 4:]), "rotary turned heads that are not its own"
        assert_near(qkv[:, :4], oracles.rotary(before[:, :4], positions, cos_sin), "rotary")

    def test_rotary_at_position_0(self, dtype: torch.dtype) -> None:
        """Position 0 changes nothing."""
        ops = self.built("rotary", dtype)
        x = self.random(3, 2, 64, dtype=dtype)
        before, positions = x.clone(), torch.zeros(3, dtype=torch.int32, device=x.device)
        ops.rotary(x, positions, self.table(64))
        assert torch.equal(x, before)

    @pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
    @pytest.mark.parametrize(("num_heads", "num_kv_heads", "block_size"), [(4, 1, 16), (7, 1, 32), (6, 3, 64)])
    def test_rotary_and_write(
        self, dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int, block_size: int
    ) -> None:
        """qk is turned in place; the turned keys, and the values as they are, are in the cache where slots say."""
        ops = self.built("rotary_and_write", dtype)
        case = self._written(dtype, head_dim, num_heads, num_kv_heads, block_size)
        before = case.qkv.clone()
        kv = case.cache_format.view(case.raw)
        self._write(ops, case)
        turned = oracles.rotary(before[:, : case.qk.shape[1]], case.positions, case.cos_sin)
        assert_near(case.qk, turned, "qk")
        assert torch.equal(case.v, before[:, case.qk.shape[1] :]), "rotary_and_write changed v"
        wanted = torch.full_like(case.raw, POISON)
        case.cache_format.write(
            case.cache_format.view(wanted), case.qk[:, num_heads:].contiguous(), case.v.contiguous(), case.slots
        )
        assert torch.equal(kv.raw[1:], wanted[1:]), "the cache does not hold the turned keys and the values"

    def _written(
        self, dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int, block_size: int
    ) -> _Written:
        """Seven tokens, two of them padding, whose slots lie at the edges of blocks; the cache holds NaN."""
        cache: Any = self.cache_format
        cache_format: KVCacheFormat = cache(KVSpec(num_kv_heads, head_dim, block_size, dtype), None)
        device = self.device_info.torch_device
        qkv = self.random(7, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
        count = num_heads + num_kv_heads
        slots = [3 * block_size - 1, block_size, -1, 5 * block_size + 3, 2 * block_size, 4 * block_size - 1, -1]
        return _Written(
            qkv,
            qkv[:, :count],
            qkv[:, count:],
            self.positions(7),
            self.table(head_dim),
            num_heads,
            cache_format,
            torch.full((7, cache_format.page_bytes()), POISON, dtype=torch.uint8, device=device),
            torch.tensor(slots, device=device),
        )

    def _write(self, ops: FusedOps, case: _Written) -> None:
        kv = case.cache_format.view(case.raw)
        ops.rotary_and_write(
            case.qk, case.v, case.positions, case.cos_sin, case.num_heads, case.cache_format, kv, case.slots
        )

    # -- all of them ------------------------------------------------------------------------------------------------

    def _calls(self, dtype: torch.dtype, num_tokens: int) -> tuple[Calls, list[torch.Tensor]]:
        """Each offered op on inputs of its own, giving its results; and all inputs that hold random numbers."""
        x, residual = self.random(num_tokens, 96, dtype=dtype), self.random(num_tokens, 96, dtype=torch.float32, seed=2)
        gated, heads = self.random(num_tokens, 192, dtype=dtype), self.random(num_tokens, 6, 64, dtype=dtype)
        weight, positions, cos_sin = self.weight(96, dtype), self.positions(num_tokens), self.table(64)
        written = self._written(dtype, 64, 4, 1, 16)

        def call(op: str) -> list[torch.Tensor]:
            ops: Any = self.built(op, dtype)
            if op == "rms_norm":
                return [ops.rms_norm(x, weight, _EPS)]
            if op == "add_rms_norm":
                return [*ops.add_rms_norm(x, residual.clone(), weight, _EPS)]
            if op == "silu_and_mul":
                return [ops.silu_and_mul(gated)]
            if op == "rotary":
                turned = heads.clone()
                ops.rotary(turned, positions, cos_sin)
                return [turned]
            self._write(ops, written)
            return [written.qkv, written.raw[1:]]

        served = [op for op in OPS if self._refusal(op, dtype) is None]
        if not served:
            pytest.skip(f"The ops serve nothing in {dtype}.")
        return {op: partial(call, op) for op in served}, [x, residual, gated, heads, written.qkv]

    def test_no_tokens(self, dtype: torch.dtype) -> None:
        """Nothing in, nothing out."""
        calls, _ = self._calls(dtype, 0)
        for op, call in calls.items():
            if op != "rotary_and_write":
                assert all(len(result) == 0 for result in call()), op

    def test_same_bits(self, dtype: torch.dtype) -> None:
        """The same inputs give the same bits, alone or among others."""
        one, two = (self._calls(dtype, 33)[0] for _ in range(2))
        for op in one:
            for first, second in zip(one[op](), two[op](), strict=True):
                assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), f"{op} gave other bits"

    def test_no_sync(self, dtype: torch.dtype) -> None:
        """No op waits for the GPU, once it has run."""
        self.need_gpu()
        calls, _ = self._calls(dtype, 33)
        for call in calls.values():
            call()
            with no_synchronisation():
                call()

    def test_graph_replay(self, dtype: torch.dtype) -> None:
        """An op captured once gives, on new numbers in the same tensors, what it gives without a graph."""
        self.need_gpu()
        calls, inputs = self._calls(dtype, 33)
        for op, call in calls.items():
            results: list[torch.Tensor] = []
            numbers = [x.clone() for x in inputs]

            def work(call: Callable[[], list[torch.Tensor]] = call, results: list[torch.Tensor] = results) -> None:
                results[:] = call()

            graph = captured(work)
            for x, fresh in zip(inputs, numbers, strict=True):
                x.copy_(-2 * fresh)
            graph.replay()
            replayed = [result.clone() for result in results]
            for x, fresh in zip(inputs, numbers, strict=True):
                x.copy_(-2 * fresh)
            for one, two in zip(replayed, call(), strict=True):
                assert torch.equal(one.view(torch.uint8), two.view(torch.uint8)), f"{op} differs in a graph"
