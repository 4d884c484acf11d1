"""This step's keys, read from `new` by descriptors: the same as from the cache, in Triton's interpreter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.testing.attention import AttentionCase, assert_right, build_attention, check_attention, make_case, make_spec
from octavo_attention_triton.backend import TritonAttention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU the kernels are compiled: test_gpu.py.")

HALF = torch.float16
Requests = Sequence[tuple[int, int]]


class OwnKeys(TritonAttention):
    """The backend, for which batches of any size are worth a descriptor."""

    min_own_tokens = 1


def _case(requests: Requests, padding: int = 0, **spec: Any) -> AttentionCase:
    given = {"num_heads": 4, "num_kv_heads": 2, "dtype": HALF} | spec
    return make_case(make_spec(**given), requests, padding_tokens=padding)


@pytest.mark.parametrize(
    "requests",
    [
        [(50, 50)],  # a whole prompt
        [(40, 73)],  # a chunk that begins within a tile of keys
        [(3, 40), (64, 64)],  # the second one's keys do not begin at the first row of `new`
        [(1, 37), (33, 97), (20, 21), (17, 17)],
        [(2, 150)],  # every whole tile is from before this step
    ],
)
def test_whole_prompts_and_chunks(requests: Requests) -> None:
    check_attention(OwnKeys, _case(requests))


def test_tokens_that_are_nobodys() -> None:
    check_attention(OwnKeys, _case([(40, 40)], padding=7))


@pytest.mark.parametrize("spec", [{"head_dim": 16}, {"num_heads": 6}, {"softcap": 3.0}, {"block_size": 64}])
def test_shapes(spec: dict[str, Any]) -> None:
    check_attention(OwnKeys, _case([(40, 60), (20, 20)], **spec))


def _forward(case: AttentionCase, new: tuple[torch.Tensor, torch.Tensor], backend: type[TritonAttention]) -> Any:
    built, _ = build_attention(backend, case.spec, None, "cpu")
    out = torch.full(case.q.shape, torch.nan, dtype=case.spec.dtype)
    built.forward(built.plan(case.batch), case.q, case.kv, out, new=new)
    return out


def test_the_same_bits_as_from_the_cache() -> None:
    case = _case([(40, 73), (33, 33)])
    assert torch.equal(_forward(case, case.new, OwnKeys), _forward(case, case.new, TritonAttention))


def test_new_is_what_is_read() -> None:
    """Other numbers in `new` show; a batch below the limit reads none of them, nor does one with a log-sum-exp."""
    case = _case([(40, 40)])
    other = tuple(torch.full_like(x, 3.0) for x in case.new)
    assert not torch.equal(_forward(case, other, OwnKeys), _forward(case, case.new, OwnKeys))
    assert_right(case, _forward(case, other, TritonAttention))
    check_attention(OwnKeys, replace(case, new=other), with_lse=True)


@pytest.mark.parametrize("spec", [{"window": 20}, {"dtype": torch.float32}, {"head_dim": 80}])
def test_what_comes_from_the_cache_all_the_same(spec: dict[str, Any]) -> None:
    case = _case([(40, 40)], **spec)
    other = tuple(torch.full_like(x, 3.0) for x in case.new)
    assert_right(case, _forward(case, other, OwnKeys))


def test_keys_that_are_no_plain_rows_come_from_the_cache() -> None:
    """A head stride that is not D, or a start within 16 bytes, is nothing for the copy engine."""
    case = _case([(40, 40)])
    wide = torch.zeros(40, 2, 2 * 64, dtype=HALF)[:, :, :64]
    odd = torch.zeros(40 * 2 * 64 + 1, dtype=HALF)[1:].view(40, 2, 64)
    for x in (wide, odd):
        assert_right(case, _forward(case, (x, x), OwnKeys))


def test_older_gpus_read_the_cache() -> None:
    """The copy engine is Hopper's."""
    spec = make_spec(dtype=HALF)
    backend, _ = build_attention(TritonAttention, spec, None, "cpu")
    assert isinstance(backend, TritonAttention) and backend._may_read_own()
    backend.spec = replace(spec, device=DeviceInfo("cuda", "A100", (8, 0)))
    assert not backend._may_read_own()


def test_warmup_reaches_it() -> None:
    backend, _ = build_attention(OwnKeys, make_spec(dtype=HALF), None, "cpu")
    backend.warmup([])
