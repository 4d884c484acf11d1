"""The torch reference attention against the float64 oracle, rule by rule of the contract (docs/design.md §6)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.attention.interface import AttentionSpec
from octavo.attention.torch_reference import TorchAttention
from octavo.batch import Batch
from octavo.kv_cache.interface import KVCache, KVSpec
from octavo.testing.attention import AttentionCase, check_attention, make_case, make_spec, run_attention

DTYPES = (torch.float32, torch.bfloat16)
GQA = ((2, 1), (3, 3), (2, 4), (1, 7), (1, 8))  # KV heads, queries of each


class FarFormat:
    """A KV format of the tests' own: float64 pages, values first and tokens before heads, 7 added to all."""

    layout = "far"

    @staticmethod
    def why_not(spec: KVSpec, options: object) -> str | None:
        return None

    def __init__(self, spec: KVSpec, options: object = None) -> None:
        self.spec = spec

    def page_bytes(self) -> int:
        return 2 * self.spec.block_size * self.spec.num_kv_heads * self.spec.head_dim * 8

    def view(self, raw: torch.Tensor) -> KVCache:
        spec = self.spec
        pages = raw.view(torch.float64).view(raw.shape[0], 2, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return KVCache(raw, pages[:, 1], pages[:, 0])

    def write(self, kv: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        live = slots >= 0
        slots, size = slots[live], self.spec.block_size
        for pages, values in ((kv.k, k), (kv.v, v)):
            pages[slots // size, slots % size] = values[live].double() + 7

    def read(self, kv: KVCache, blocks: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = ((pages[blocks].flatten(0, 1)[:n] - 7).float() for pages in (kv.k, kv.v))
        return k, v


def check(case: AttentionCase) -> None:
    """All ways to call forward."""
    for with_lse in (False, True):
        for with_new in (False, True):
            check_attention(TorchAttention, case, with_lse=with_lse, with_new=with_new)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kv_heads", "group"), GQA)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_c1_c11_shapes(dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int) -> None:
    """A mixed batch: decodes, chunks after a cached prefix, whole prompts."""
    spec = make_spec(num_heads=num_kv_heads * group, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    check(make_case(spec, [(1, 1), (1, 37), (9, 50), (12, 12), (12, 12)], padding_requests=2))


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("features", [{}, {"window": 11}, {"softcap": 2.5}, {"window": 40, "softcap": 4.0}])
def test_c1_lengths_at_the_edges_of_blocks(block_size: int, features: dict[str, Any]) -> None:
    """Alone, decoding and as chunks; window and softcap too."""
    spec = make_spec(block_size=block_size, **features)
    lens = [block_size - 1, block_size, block_size + 1, 2 * block_size, 3 * block_size + 1]
    check(make_case(spec, [(1, m) for m in lens]))
    check(make_case(spec, [(5, m) for m in lens]))
    check(make_case(spec, [(m, m) for m in lens]))


@pytest.mark.parametrize("window", [1, 2, 8, 15, 16, 17, 64])
def test_c1_window_sees_its_keys_and_no_other(window: int) -> None:
    """Blocks behind it are the null block; lengths differ, so that each request's first block does too."""
    spec = make_spec(window=window, block_size=8)
    check(make_case(spec, [(1, m) for m in (1, 7, 16, 17, 23, 40, 41)]))
    check(make_case(spec, [(1, 64), (3, 20), (24, 64), (30, 30)]))


def test_c1_one_decode_with_a_window() -> None:
    for m in (5, 8, 9, 30):
        check(make_case(make_spec(window=8, block_size=8), [(1, m)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_c3_padding_is_finite(dtype: torch.dtype) -> None:
    """Padding of a decode graph, of a mixed batch, and tokens beyond all requests."""
    spec = make_spec(dtype=dtype)
    check(make_case(spec, [(1, 20), (1, 33)], padding_requests=6))
    check(make_case(spec, [(1, 20), (6, 33)], padding_requests=3, padding_tokens=5))
    check(make_case(spec, [], padding_requests=4))


def test_c8_lse_of_large_scores() -> None:
    """Natural logarithm, far beyond what exp can hold."""
    spec = make_spec()
    case = make_case(spec, [(1, 60), (10, 40)], magnitude=8.0)
    assert case.expected.lse.max() > 90  # exp of it is infinite in float32
    check(case)


def test_c9_no_tokens() -> None:
    check(make_case(make_spec(), []))


def test_c9_views_of_any_stride() -> None:
    """Queries, keys and values are slices of one tensor, tables of a wider one."""
    case = make_case(make_spec(), [(1, 20), (7, 20)])
    assert not case.q.is_contiguous() and not case.new[0].is_contiguous()
    assert not case.batch.block_tables[0].is_contiguous()
    check(case)


def test_c7_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """The blocks at the far end of a cache of more than 2^31 elements, which is a file with a hole."""
    spec = make_spec(num_heads=8, num_kv_heads=8, head_dim=128, block_size=32, dtype=torch.bfloat16)
    case = make_case(spec, [(1, 50), (4, 70)])
    page_bytes, small = spec.cache_format.page_bytes(), case.kv.raw
    shift = 2 * (1 << 31) // page_bytes + 1
    size = (shift + len(small)) * page_bytes
    raw = torch.from_file(str(tmp_path / "cache"), shared=True, size=size, dtype=torch.uint8).view(-1, page_bytes)
    raw[shift:] = small
    backend = TorchAttention(spec, None, torch.empty(0, dtype=torch.uint8))
    batch = replace(case.batch, block_tables=(case.batch.block_tables[0] + shift,))
    out, _ = run_attention(TorchAttention, case, with_new=False)
    far = torch.empty_like(out)
    backend.forward(backend.plan(batch), case.q, spec.cache_format.view(raw), far)
    assert torch.equal(far, out)


def test_c10_without_new_keys_the_cache_is_read() -> None:
    """What is in the cache counts, not `new`."""
    case = make_case(make_spec(), [(1, 20), (20, 20)])
    poisoned = tuple(torch.full_like(x, torch.nan) for x in case.new)
    check_attention(TorchAttention, replace(case, new=(poisoned[0], poisoned[1])), with_new=False)


@pytest.mark.parametrize("requests", [[(1, 30)] * 40, [(1, m) for m in range(30, 70)], [(9, 40), (20, 20)]])
def test_c12_same_inputs_same_bits(requests: list[tuple[int, int]]) -> None:
    case = make_case(make_spec(dtype=torch.bfloat16, head_dim=128), requests)
    first, _ = run_attention(TorchAttention, case)
    for _ in range(3):
        assert torch.equal(run_attention(TorchAttention, case)[0], first)


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


@pytest.mark.parametrize("features", [{}, {"window": 13}, {"softcap": 2.0}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_layout_is_attended_through_read(dtype: torch.dtype, features: dict[str, Any]) -> None:
    spec = make_spec(dtype=dtype, cache_format=FarFormat, block_size=8, **features)
    assert spec.kv_layout == "far"
    check(make_case(spec, [(1, 9), (1, 40), (6, 6), (11, 40)], padding_requests=1, padding_tokens=2))


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
