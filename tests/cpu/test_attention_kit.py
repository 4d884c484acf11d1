"""The kit itself: a reference spoiled in one way is caught, and the oracle agrees with torch's own attention."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from octavo.attention.torch_reference import TorchAttention
from octavo.batch import Batch
from octavo.kv_cache.interface import KVCache
from octavo.testing.attention import attend, check_attention, make_case, make_spec

New = tuple[torch.Tensor, torch.Tensor] | None


class _Spoiled(TorchAttention):
    """Calls `spoil` around the reference's forward."""

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


class Base2(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        if lse is not None:
            lse /= math.log(2)


class Writer(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        kv.raw[0, 0] = 1


class QueryWriter(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        q[0] *= 2


class Overrunner(_Spoiled):
    def spoil(self, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()


class NoPadding(TorchAttention):
    def plan(self, batch: Batch) -> Any:
        return replace(super().plan(batch), padding=[])


class WrongScale(TorchAttention):
    def __init__(self, spec: Any, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(replace(spec, scale=spec.scale * 1.02), options, scratch)


class WrongHeads(TorchAttention):
    def forward(self, plan: Any, q: torch.Tensor, *others: Any) -> None:
        super().forward(plan, q.view(len(q), 2, 2, -1).transpose(1, 2).flatten(1, 2), *others)


class WideWindow(TorchAttention):
    def __init__(self, spec: Any, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(replace(spec, features={"window": spec.features["window"] + 1}), options, scratch)


class NoWindow(TorchAttention):
    def __init__(self, spec: Any, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(replace(spec, features={}), options, scratch)


class SeesAhead(TorchAttention):
    def _seen(self, query_len: int, num_keys: int, device: torch.device) -> torch.Tensor:
        seen = super()._seen(query_len, num_keys, device)
        return seen | seen.roll(1, dims=1)


class StaleBlock(TorchAttention):
    def _heads_of(self, blocks: torch.Tensor) -> torch.Tensor:
        return super()._heads_of(blocks.clone().index_fill_(1, torch.tensor(blocks.shape[1] - 1), 1))


class UnusedSlots(TorchAttention):
    def _unused(self, ends: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        return None


class CoarseScores(TorchAttention):
    def _attend_by_products(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        scores = (q @ k.transpose(-1, -2)).float() * self.spec.scale
        return torch.softmax(scores, -1).to(q.dtype) @ v


MIXED = [(1, 37), (1, 40), (6, 30)]


@pytest.mark.parametrize(
    ("spoiled", "rule", "features", "requests"),
    [
        (Base2, "C8", {}, MIXED),
        (Writer, "C13", {}, MIXED),
        (QueryWriter, "C13", {}, MIXED),
        (Overrunner, "C13", {}, MIXED),
        (NoPadding, "C3", {}, MIXED),
        (WrongScale, "C11", {}, MIXED),
        (WrongHeads, "C1", {}, MIXED),
        (WideWindow, "C1", {"window": 8}, MIXED),
        (NoWindow, "C1", {"window": 33}, [(1, 37)]),
        (SeesAhead, "C1", {}, MIXED),
        (StaleBlock, "C1", {}, [(1, 48), (1, 48), (16, 16)]),
        (UnusedSlots, "C10", {}, MIXED),
    ],
)
def test_a_fault_is_caught(
    spoiled: type[TorchAttention], rule: str, features: dict[str, Any], requests: list[tuple[int, int]]
) -> None:
    case = make_case(make_spec(**features), requests, padding_tokens=2)
    check_attention(TorchAttention, case, with_lse=True)
    with pytest.raises(AssertionError, match=rule):
        check_attention(spoiled, case, with_lse=True)


def test_scores_rounded_to_bfloat16_are_caught() -> None:
    case = make_case(make_spec(num_heads=9, num_kv_heads=3, dtype=torch.bfloat16), [(1, 256)] * 32, magnitude=2.0)
    with pytest.raises(AssertionError, match="C11"):
        check_attention(CoarseScores, case)


def test_the_oracle_is_torchs_attention() -> None:
    """In float64, of a chunk that follows a prefix."""
    spec = make_spec(num_heads=6, num_kv_heads=2)
    q, k, v = (torch.randn(n, h, 64, dtype=torch.float64) for n, h in ((5, 6), (20, 2), (20, 2)))
    mask = torch.ones(5, 20, dtype=torch.bool).tril(15)
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, spec)[0], wanted.transpose(0, 1))


def test_the_oracle_by_hand() -> None:
    """Two keys with scores 0 and 1, then a softcap and a window on them."""
    q, k, v = torch.ones(1, 1, 1), torch.tensor([[[0.0]], [[1.0]]]), torch.tensor([[[0.0]], [[1.0]]])
    common: dict[str, Any] = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 1}
    out, lse, spread, scores = attend(q, k, v, make_spec(**common))
    assert out.item() == spread.item() == pytest.approx(math.e / (1 + math.e))
    assert lse.item() == pytest.approx(math.log(1 + math.e))
    assert scores.item() == 1
    capped = math.exp(0.5 * math.tanh(2))
    assert attend(q, k, v, make_spec(**common, softcap=0.5))[0].item() == pytest.approx(capped / (1 + capped))
    assert attend(q, k, v, make_spec(**common, window=1))[0].item() == 1


def test_cases_hold_only_what_is_used() -> None:
    """The null block and all unused slots are NaN, entries behind the window null, and blocks nobody's twice."""
    case = make_case(make_spec(window=20, block_size=8), [(1, 61), (4, 32)], padding_requests=1)
    table = case.batch.block_tables[0]
    assert table[0].tolist()[:5] == [0] * 5 and table[0, 5] != 0
    assert table[1].tolist()[0] == 0 and table[1, 1] != 0
    live = table[table != 0].tolist()
    assert len(set(live)) == len(live)
    assert case.kv.k[0].isnan().all()
    last = case.kv.k[int(table[0, 7])]
    assert last[:, 5:].isnan().all() and not last[:, :5].isnan().any()


def test_cases_refuse_decodes_that_do_not_come_first() -> None:
    with pytest.raises(ValueError, match="come first"):
        make_case(make_spec(), [(2, 5), (1, 4)])


def test_cases_repeat() -> None:
    first, second, other = (make_case(make_spec(), MIXED, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.q, second.q) and torch.equal(first.batch.slots[0], second.batch.slots[0])
    assert not torch.equal(first.q, other.q)
