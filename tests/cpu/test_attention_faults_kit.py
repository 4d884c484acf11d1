"""The kit catches faults: the reference spoiled in one way fails in a test whose name says what is wrong."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from octavo.attention.torch_reference import TorchAttention
from octavo.batch import Batch
from octavo.kv_cache.interface import KVCache
from octavo.testing import AttentionConformance

New = tuple[torch.Tensor, torch.Tensor] | None


class _Spoiled(TorchAttention):
    """Calls `spoil` after the reference's forward."""

    def forward(
        self,
        plan: Any,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: New = None,
    ) -> None:
        super().forward(plan, q, kv, out, lse, new)
        self.spoil(q, kv, out, lse)

    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """What is wrong."""


class Base2Lse(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        if lse is not None:
            lse /= math.log(2)


class CacheWriter(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        kv.raw[0, 0] = 1


class QueryWriter(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        q[0] *= 2


class Overrunner(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()


class NeverTheSame(_Spoiled):
    calls = 0

    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        NeverTheSame.calls += 1
        out[0, 0, 0] *= 1 + 2.0**-23 * (NeverTheSame.calls % 2)


class NeighboursMatter(_Spoiled):
    batch_invariant = True

    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        out *= 1 + 2.0**-22 * (len(q) > 1)


class ScratchOverrunner(_Spoiled):
    def __init__(self, spec: Any, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(spec, options, scratch)
        self.scratch = scratch

    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        self.scratch.as_strided((1,), (1,), self.scratch.storage_offset() + self.scratch.numel()).zero_()


class ScratchKeeper(ScratchOverrunner):
    """Keeps across calls in the scratch what it should keep elsewhere."""

    @staticmethod
    def scratch_bytes(spec: Any, options: Any) -> int:
        return 4

    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        kept = self.scratch.view(torch.float32)
        out += kept.nan_to_num(0.0)
        kept.fill_(1.0)


class UnwrittenPadding(TorchAttention):
    def plan(self, batch: Batch) -> Any:
        return replace(super().plan(batch), padding=[])


class OwnScale(TorchAttention):
    def __init__(self, spec: Any, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(replace(spec, scale=spec.head_dim**-0.5), options, scratch)


class WrongHeads(TorchAttention):
    """Query head h goes to KV head h % Hk."""

    def forward(self, plan: Any, q: torch.Tensor, kv: KVCache, out: torch.Tensor, *others: Any, **more: Any) -> None:
        count, group = self.spec.num_kv_heads, self.group_size
        mine = torch.empty_like(out)
        super().forward(plan, q.reshape(len(q), group, count, -1).transpose(1, 2).flatten(1, 2), kv, mine, *others)
        out.copy_(mine.view(len(q), count, group, -1).transpose(1, 2).flatten(1, 2))


class WideWindow(TorchAttention):
    def __init__(self, spec: Any, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(replace(spec, features={"window": spec.features["window"] + 1}), options, scratch)


class NoFeatures(TorchAttention):
    """Says that it supports them, and ignores them."""

    def __init__(self, spec: Any, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(replace(spec, features={}), options, scratch)


class SeesAhead(TorchAttention):
    def _seen(self, query_len: int, num_keys: int, device: torch.device) -> torch.Tensor:
        seen = super()._seen(query_len, num_keys, device)
        return seen | seen.roll(1, dims=1)


class StaleBlock(TorchAttention):
    def _heads_of(self, blocks: torch.Tensor) -> torch.Tensor:
        return super()._heads_of(blocks.clone().index_fill_(1, torch.tensor(blocks.shape[1] - 1), 1))


class ReadsUnusedSlots(TorchAttention):
    def _unused(self, ends: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        return None


class NarrowOffsets(TorchAttention):
    """Offsets of elements in 32 bits: blocks beyond 2^31 elements wrap around."""

    def plan(self, batch: Batch) -> Any:
        page = self.spec.cache_format.page_bytes() // self.spec.dtype.itemsize
        (table,) = batch.block_tables
        return super().plan(replace(batch, block_tables=((table.long() * page % (1 << 31) // page).int(),)))


class UnmergedSplit(TorchAttention):
    """Only the last 512 keys of a decoding request count."""

    def plan(self, batch: Batch) -> Any:
        window = {"window": 512} if batch.shape.max_query_len == 1 else {}
        other = TorchAttention(replace(self.spec, features=window), None, torch.empty(0, dtype=torch.uint8))
        return other.plan(batch)


class CoarseScores(TorchAttention):
    def _attend_by_products(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2)).float() * self.spec.scale
        return torch.softmax(scores, -1).to(q.dtype) @ v


class OldPlan(TorchAttention):
    """Keeps the first plan that it made."""

    first: Any = None

    def plan(self, batch: Batch) -> Any:
        self.first = self.first or super().plan(batch)
        return self.first


class HostPlanner(TorchAttention):
    """Says that it plans on the device; the reference believes the host's lists."""

    plans_on_device = True


class RefusesAll(TorchAttention):
    @staticmethod
    def why_not(spec: Any, options: Any) -> str | None:
        return "it is tired"


FAULTS: list[tuple[type[TorchAttention], str, dict[str, Any]]] = [
    (SeesAhead, "test_c1_causal_alignment", {}),
    (WrongHeads, "test_c1_grouped_heads", {"num_kv_heads": 2, "group": 3, "head_dim": 64}),
    (StaleBlock, "test_c1_block_edges", {"block_size": 16}),
    (NoFeatures, "test_c1_window", {"window": 17}),
    (WideWindow, "test_c1_window", {"window": 8}),
    (UnwrittenPadding, "test_c3_padding", {}),
    (Base2Lse, "test_c8_lse", {}),
    (ReadsUnusedSlots, "test_c10_unused_slots_are_poisoned", {"poison": 0xFF}),
    (NoFeatures, "test_c11_softcap", {"features": {"softcap": 2.5}}),
    (OwnScale, "test_c11_scale", {}),
    (CoarseScores, "test_c11_exact_scores", {"dtype": torch.bfloat16}),
    (NeverTheSame, "test_c12_same_bits", {"requests": [(1, 30)]}),
    (CacheWriter, "test_c13_writes_nothing_else", {}),
    (QueryWriter, "test_c13_writes_nothing_else", {}),
    (Overrunner, "test_c13_writes_nothing_else", {}),
    (ScratchOverrunner, "test_c13_writes_nothing_else", {}),
    (ScratchKeeper, "test_scratch_is_dead_after_forward", {}),
    (UnmergedSplit, "test_c8_splits_are_merged", {}),
    (OldPlan, "test_padded_buffers", {}),
    (HostPlanner, "test_c6_plan_reads_tensors_alone", {}),
    (NeighboursMatter, "test_batch_invariant", {}),
]


def _kit(spoiled: type[TorchAttention]) -> Any:
    class Kit(AttentionConformance):
        backend: ClassVar = spoiled
        device: ClassVar = "cpu"

    return Kit()


@pytest.mark.parametrize(("spoiled", "name", "given"), FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_a_fault_is_caught(spoiled: type[TorchAttention], name: str, given: dict[str, Any]) -> None:
    given = {"dtype": torch.float32, **given}
    if spoiled not in (NeighboursMatter, HostPlanner):  # the reference does not promise that
        getattr(_kit(TorchAttention), name)(**given)
    with pytest.raises(AssertionError):
        getattr(_kit(spoiled), name)(**given)


def test_narrow_offsets_are_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"C1|C10"):
        _kit(NarrowOffsets).test_c7_offsets_beyond_32_bits(tmp_path)


def test_refusing_everything_is_no_pass() -> None:
    with pytest.raises(AssertionError, match="it is tired"):
        _kit(RefusesAll).test_serves_some_dtype()
    with pytest.raises(pytest.skip.Exception, match="it is tired"):
        _kit(RefusesAll).test_c3_padding(torch.float32)


AUTHORS_FILE = """
import torch
from octavo.attention.torch_reference import TorchAttention
from octavo.testing import AttentionConformance

class Mine(TorchAttention):
    features = frozenset({"softcap"})

    def forward(self, plan, q, kv, out, lse=None, new=None):
        super().forward(plan, q, kv, out, lse, new)
        kv.raw[0, 0] = 1

class TestMine(AttentionConformance):
    backend = Mine
    dtypes = (torch.float32,)
    """


def test_a_plugin_authors_whole_file(tmp_path: Path) -> None:
    """A subclass with one attribute, in a project without settings: a fault is named, a refusal skipped with why."""
    (tmp_path / "test_mine.py").write_text(AUTHORS_FILE, encoding="utf-8")
    options = "-rs -q -p no:cacheprovider -p no:asyncio test_mine.py -k"
    command = [sys.executable, "-m", "pytest", *options.split(), "c13 or window or serves"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "test_c13_writes_nothing_else[float32]" in done.stdout
    assert "C13: forward or plan wrote to its inputs" in done.stdout
    assert "The backend refuses: it does not support window." in done.stdout
    assert "1 failed, 1 passed, 4 skipped" in done.stdout
