"""A part of the attention contract in Triton's interpreter, on the CPU: float32 and float16, within a minute.

The interpreter's products of bfloat16 and float8 are wrong; test_gpu.py runs the whole contract on a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.testing.attention import assert_right, build_attention, check_attention, make_case, make_spec
from octavo_attention_triton.backend import TritonAttention
from octavo_attention_triton.options import TritonAttentionOptions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU the kernels are compiled: test_gpu.py.")

Requests = Sequence[tuple[int, int]]

MIXED = ((1, 1), (1, 37), (9, 50), (12, 12))
ONE_KV_HEAD = {"num_heads": 2, "num_kv_heads": 1}
HALF = torch.float16


def _check(requests: Requests, spec: dict[str, Any] | None = None, splits: int | None = None, **case: Any) -> None:
    options = TritonAttentionOptions(splits=splits)
    built = make_case(make_spec(**(ONE_KV_HEAD | (spec or {}))), requests, **case)
    assert TritonAttention.why_not(built.spec, options) is None
    check_attention(TritonAttention, built, options, with_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("requests", [MIXED, [(1, 40)], [(3, 40), (33, 97)]])
def test_decodes_prompts_and_chunks(requests: Requests, dtype: torch.dtype) -> None:
    _check(requests, {"dtype": dtype})


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128), (7, 80), (8, 256), (40, 16)])
def test_groups_and_head_sizes(group: int, head_dim: int) -> None:
    _check([(1, 37), (9, 50)], {"num_heads": 2 * group, "num_kv_heads": 2, "head_dim": head_dim, "dtype": HALF})


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_lengths_at_the_edges_of_blocks(block_size: int) -> None:
    lens = (block_size - 1, block_size, 2 * block_size + 1)
    whole = (block_size + 1, block_size + 1)
    _check([*((1, m) for m in lens), *((5, m) for m in lens), whole], {"block_size": block_size})


@pytest.mark.parametrize("seq_len", [15, 16, 17, 31, 32, 33, 64, 65])
def test_lengths_at_the_edges_of_tiles(seq_len: int) -> None:
    _check([(1, seq_len), (2, seq_len), (seq_len, seq_len)])


@pytest.mark.parametrize("window", [1, 8, 17, 64])
def test_windows(window: int) -> None:
    _check([(1, 7), (1, 81), (3, 20), (70, 90)], {"window": window})


@pytest.mark.parametrize("features", [{"softcap": 2.5}, {"softcap": 30.0}, {"softcap": 4.0, "window": 11}])
def test_softcaps(features: dict[str, float]) -> None:
    _check(MIXED, features, magnitude=2.0)


@pytest.mark.parametrize(
    ("requests", "padding"),
    [
        ([(1, 20), (1, 33)], {"padding_requests": 6}),
        ([(1, 20), (1, 33)], {"padding_requests": 1, "padding_tokens": 20}),
        ([(1, 20), (6, 33)], {"padding_requests": 3, "padding_tokens": 5}),
        ([], {"padding_requests": 4}),
        ([], {}),
    ],
)
def test_padding_is_zero(requests: Requests, padding: dict[str, int]) -> None:
    _check(requests, **padding)


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_numbers_of_splits(splits: int) -> None:
    _check([(1, 1), (1, 31), (1, 129), (4, 20)], splits=splits)


def test_splits_of_a_window() -> None:
    _check([(1, 200), (1, 20)], {"window": 50}, splits=3)


def test_more_splits_than_are_merged_at_once() -> None:
    _check([(1, 330)], splits=20)


@pytest.mark.parametrize("poison", [0xFF, 0x7B])
def test_unused_slots_are_not_read(poison: int) -> None:
    _check([(1, 5), (1, 61), (3, 18)], {"window": 9}, poison=poison)


def test_one_object_serves_one_batch_after_another() -> None:
    """Counters are left at zero, and nothing of an earlier plan is taken for the new one's."""
    spec = make_spec(**ONE_KV_HEAD)
    backend, scratch = build_attention(TritonAttention, spec, None, "cpu")
    for requests in (MIXED, [(1, 200), (1, 20)], [(20, 30)], MIXED):
        case = make_case(spec, requests)
        plan, out = backend.plan(case.batch), torch.empty(case.q.shape)
        for byte in (0x00, 0xFF):
            scratch.fill_(byte)
            backend.forward(plan, case.q, case.kv, out.fill_(torch.nan))
            assert_right(case, out)


@pytest.mark.parametrize("num_decodes", [0, 1, 2])
def test_the_number_of_decodes_is_a_hint(num_decodes: int) -> None:
    """A graph's shape may say fewer or more decodes than its batch has (but all of them only where that is so)."""
    case = make_case(make_spec(**ONE_KV_HEAD), [(1, 20), (6, 33), (6, 6)], padding_requests=1)
    shape = replace(case.batch.shape, num_decodes=num_decodes)
    check_attention(TritonAttention, replace(case, batch=replace(case.batch, shape=shape)), with_lse=True)


def test_scales_of_the_cache() -> None:
    """Scales of a quantized cache: keys and values are stored divided by them, and read multiplied."""
    case = make_case(make_spec(num_heads=4, num_kv_heads=2), MIXED)
    k_scale, v_scale = torch.tensor([0.5, 4.0]), torch.tensor([2.0, 0.25])
    scaled = case.spec.cache_format.view(case.kv.raw.clone())
    scaled.k.div_(k_scale.view(-1, 1, 1))
    scaled.v.div_(v_scale.view(-1, 1, 1))
    check_attention(TritonAttention, replace(case, kv=replace(scaled, k_scale=k_scale, v_scale=v_scale)), with_lse=True)


def test_warmup_runs_on_no_keys() -> None:
    spec = make_spec(window=5)
    backend, _ = build_attention(TritonAttention, spec, None, "cpu")
    backend.warmup([])
