"""Decode attention keeps the contract, in parts and alone, and gives the same bits with any number of threads."""

from dataclasses import replace

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.testing import AttentionConformance
from octavo.testing.attention import (
    AttentionCase,
    build_attention,
    check_attention,
    make_case,
    make_spec,
    run_attention,
)
from octavo_native_cpu.attention import DecodePlan, NativeAttention
from octavo_native_cpu.build import built

pytestmark = pytest.mark.skipif(built().library is None, reason=f"{built().reason}")

DTYPES = (torch.float32, torch.bfloat16)
GQA = ((2, 1), (3, 3), (2, 4), (1, 7), (1, 8), (1, 19))  # KV heads, queries of each


class TestNativeAttention(AttentionConformance):
    backend = NativeAttention
    device = "cpu"
    dtypes = DTYPES
    num_random_batches = 8


def check(case: AttentionCase) -> None:
    """With a log-sum-exp and without."""
    for with_lse in (False, True):
        check_attention(NativeAttention, case, with_lse=with_lse)


def plan_of(case: AttentionCase) -> DecodePlan:
    """The plan of a batch of decodes."""
    backend, _ = build_attention(NativeAttention, case.spec, None, "cpu")
    plan = backend.plan(case.batch)
    assert isinstance(plan, DecodePlan)
    return plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("num_kv_heads", "group"), GQA)
def test_heads(dtype: torch.dtype, head_dim: int, num_kv_heads: int, group: int) -> None:
    heads = {"num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check(make_case(make_spec(dtype=dtype, **heads), [(1, 1), (1, 37), (1, 200)], padding_requests=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("window", [None, 1, 30, 100])
def test_blocks_and_windows(dtype: torch.dtype, block_size: int, window: int | None) -> None:
    spec = make_spec(dtype=dtype, block_size=block_size, window=window)
    for requests in ([(1, 300)], [(1, m) for m in (7, 8, 9, 63, 64, 65, 150)]):
        check(make_case(spec, requests, padding_requests=2, padding_tokens=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_c12_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    """Also where a few requests are cut into parts, which a plan must not do by the number of threads."""
    spec = make_spec(num_heads=9, num_kv_heads=3, dtype=dtype)
    for requests in ([(1, 1000)], [(1, 700), (1, 3), (1, 65)], [(1, 90 + i) for i in range(20)]):
        case = make_case(spec, requests)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run_attention(NativeAttention, case, with_lse=True))
        for out, lse in results[1:]:
            assert torch.equal(out, results[0][0])
            assert lse is not None and results[0][1] is not None and torch.equal(lse, results[0][1])


def test_nan_is_not_hidden() -> None:
    """What a NaN among a request's keys touches is NaN, and other requests are not touched."""
    case = make_case(make_spec(num_heads=2, num_kv_heads=2), [(1, 20), (1, 30)])
    block = int(case.batch.block_tables[0][0, 0])
    case.kv.k[block, 0, 3] = torch.nan
    out, _ = run_attention(NativeAttention, case)
    assert out[0, 0].isnan().all()
    assert not out[0, 1].isnan().any() and not out[1].isnan().any()


def test_a_plan_keeps_what_it_points_to() -> None:
    """Plans outlive later ones, and the host's lists that they were made of."""
    case = make_case(make_spec(), [(1, 100), (1, 40)])
    backend, _ = build_attention(NativeAttention, case.spec, None, "cpu")
    lens = list(case.batch.seq_lens_host)
    plan = backend.plan(replace(case.batch, seq_lens_host=lens))
    lens[:] = [1, 1]
    for _ in range(50):
        backend.plan(case.batch)
    out = torch.empty(case.q.shape)
    backend.forward(plan, case.q, case.kv, out)
    torch.testing.assert_close(out.double(), case.expected.out, atol=1e-5, rtol=1e-5)


def test_batches_with_prompts_are_shared_with_torch() -> None:
    case = make_case(make_spec(), [(1, 20), (5, 9)])
    backend, _ = build_attention(NativeAttention, case.spec, None, "cpu")
    assert not isinstance(backend.plan(case.batch), DecodePlan)
    assert plan_of(make_case(make_spec(), [(1, 20)])).num_requests == 1


def test_why_not() -> None:
    assert NativeAttention.why_not(make_spec(dtype=torch.bfloat16), None) is None
    assert "72" in str(NativeAttention.why_not(make_spec(head_dim=72), None))
    assert "float16" in str(NativeAttention.why_not(make_spec(dtype=torch.float16), None))
    assert "cuda" in str(NativeAttention.why_not(make_spec(device=DeviceInfo("cuda", "GPU")), None))
