"""What is the torch reference attention's own; test_attention_conformance_kit.py holds it to the contract."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.attention.interface import AttentionSpec
from octavo.attention.torch_reference import TorchAttention
from octavo.batch import Batch
from octavo.testing.attention import AttentionCase, check_attention, make_case, make_spec, run_attention

DTYPES = (torch.float32, torch.bfloat16)
GQA = ((2, 1), (3, 3), (2, 4), (1, 7), (1, 8))  # KV heads, queries of each


def check(case: AttentionCase) -> None:
    """All ways to call forward."""
    for with_lse in (False, True):
        for with_new in (False, True):
            check_attention(TorchAttention, case, with_lse=with_lse, with_new=with_new)


def test_c1_one_decode_with_a_window() -> None:
    for m in (5, 8, 9, 30):
        check(make_case(make_spec(window=8, block_size=8), [(1, m)]))


def test_c10_without_new_keys_the_cache_is_read() -> None:
    """What is in the cache counts, not `new`."""
    case = make_case(make_spec(), [(1, 20), (20, 20)])
    poisoned = tuple(torch.full_like(x, torch.nan) for x in case.new)
    check_attention(TorchAttention, replace(case, new=(poisoned[0], poisoned[1])), with_new=False)


def test_plans_outlive_later_ones() -> None:
    """Plan n + 1 is made while step n runs, and a plan serves every layer."""
    spec = make_spec()
    backend = TorchAttention(spec, None, torch.empty(0, dtype=torch.uint8))
    cases = [make_case(spec, [(1, 20), (5, 9)], seed=1), make_case(spec, [(1, 33), (1, 8), (8, 8)], seed=2)]
    plans = [backend.plan(case.batch) for case in cases]
    for _ in range(2):
        for case, plan in zip(cases, plans, strict=True):
            out = torch.empty(case.q.shape)
            backend.forward(plan, case.q, case.kv, out)
            torch.testing.assert_close(out.double(), case.expected.out, atol=1e-5, rtol=1e-5)


def test_many_decodes_by_products_are_as_exact_as_alone() -> None:
    """The batched products of large bfloat16 batches stay within one rounding, and are what serves there."""
    spec = make_spec(num_heads=9, num_kv_heads=3, dtype=torch.bfloat16)
    for requests in ([(1, 256)] * 32, [(1, 160 + 5 * i) for i in range(32)]):
        case = make_case(spec, requests, magnitude=2.0)
        check(case)
        together, _ = run_attention(TorchAttention, case)
        calls: list[int] = []

        class Counting(TorchAttention):
            def _attend_by_products(
                self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
            ) -> torch.Tensor:
                calls.append(len(q))  # noqa: B023
                return super()._attend_by_products(q, k, v, mask)

        assert torch.equal(run_attention(Counting, case)[0], together)
        assert calls == [32]


def test_requests_without_tokens_hide_no_other() -> None:
    """One that computes nothing may stand anywhere; what follows it is still found."""
    case = make_case(make_spec(), [(2, 20), (3, 9)])
    batch = case.batch
    index = torch.tensor([0, 0, 1])
    batch = replace(
        batch,
        query_start=torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        seq_lens=batch.seq_lens[index],
        row_index=torch.arange(3, dtype=torch.int32),
        block_tables=(batch.block_tables[0][index],),
        query_start_host=[0, 2, 2, 5],
        seq_lens_host=[20, 20, 9],
    )
    check(replace(case, batch=batch))


@st.composite
def batches(draw: st.DrawFn) -> tuple[AttentionSpec, list[tuple[int, int]], dict[str, int]]:
    num_kv_heads, group = draw(st.sampled_from(GQA))
    features: dict[str, Any] = draw(st.sampled_from([{}, {"window": 9}, {"softcap": 3.0}]))
    spec = make_spec(
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([64, 80, 128])),
        block_size=draw(st.sampled_from([8, 16, 32])),
        dtype=draw(st.sampled_from(DTYPES)),
        **features,
    )
    decodes = draw(st.lists(st.integers(1, 70), max_size=6))
    chunks = draw(st.lists(st.tuples(st.integers(2, 40), st.integers(0, 40)), max_size=4))
    requests = [*((1, m) for m in decodes), *((n, n + cached) for n, cached in chunks)]
    padding = {"padding_requests": draw(st.integers(0, 3)), "padding_tokens": draw(st.integers(0, 3))}
    return spec, requests, padding


@settings(max_examples=40, deadline=None)
@given(batches(), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_any_batch(
    drawn: tuple[AttentionSpec, list[tuple[int, int]], dict[str, int]], seed: int, with_lse: bool, with_new: bool
) -> None:
    spec, requests, padding = drawn
    case = make_case(spec, requests, seed=seed, **padding)
    check_attention(TorchAttention, case, with_lse=with_lse, with_new=with_new)


def test_plan_reads_only_the_host_lengths() -> None:
    """A plan needs no device tensor of lengths: what the core may write late is not waited for."""
    case = make_case(make_spec(), [(1, 20), (5, 9)])
    batch: Batch = replace(
        case.batch,
        query_start=torch.full_like(case.batch.query_start, -7),
        seq_lens=torch.full_like(case.batch.seq_lens, -7),
    )
    check(replace(case, batch=batch))
