"""The tune command's parts that need no GPU: its batches are real ones, and its counts are right."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from octavo.testing.attention import make_spec
from octavo_attention_triton import tune
from octavo_attention_triton.backend import TritonAttention
from octavo_attention_triton.bench import Workload, build, make_inputs
from octavo_attention_triton.options import TritonAttentionOptions

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="The batch is for Triton's interpreter.")


@without_gpu
@pytest.mark.parametrize("work", [Workload("decode", 2, 1, 40), Workload("prefill", 1, 20, 20)])
def test_inputs_are_a_batch_that_the_backend_serves(work: Workload) -> None:
    spec = make_spec(head_dim=16)
    inputs = make_inputs(work, spec, cold_bytes=3 * work.kv_bytes(spec))
    assert len(inputs.caches) == 3
    backend = build(TritonAttention, spec, TritonAttentionOptions())
    backend.forward(backend.plan(inputs.batch), inputs.q, inputs.caches[2], inputs.out, new=inputs.new)
    blocks = inputs.batch.block_tables[0][0]
    k, v = spec.cache_format.read(inputs.caches[2], blocks, work.seq_len)
    q = inputs.q[: work.query_len]
    heads = [x.transpose(0, 1) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], is_causal=work.query_len > 1, scale=spec.scale, enable_gqa=True
    )
    torch.testing.assert_close(inputs.out[: work.query_len], wanted.transpose(0, 1))


def test_counts_of_bytes_and_operations() -> None:
    spec = make_spec(num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.bfloat16)
    assert Workload("", 3, 1, 10).kv_bytes(spec) == 2 * 3 * 10 * 2 * 16 * 2
    assert Workload("", 1, 3, 5).flops(spec) == 4 * 4 * 16 * (3 + 4 + 5)


def test_every_workload_fits_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "current_device", lambda kind: make_spec().device)
    spec = tune.bench_spec()
    assert all(work.count <= spec.max_requests for work in tune.WORKLOADS)
    assert all(work.count * work.query_len <= spec.max_tokens for work in tune.WORKLOADS)
    assert all(work.seq_len <= spec.max_model_len for work in tune.WORKLOADS)


@without_gpu
def test_a_candidate_that_fails_leaves_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    pinned = tune.tuning_for((0, 0), 16, 4)
    wrong = replace(pinned.decodes[0], block_n=24)  # no power of two: Triton refuses it
    candidates = tune._candidates([wrong], [], pinned)
    spec = make_spec(head_dim=16)
    right = list(tune._checked(candidates, spec, float("inf"), [(1, 30), (9, 20)]))
    assert [one.name for one in right] == ["pinned"]
    assert tune._name(wrong) in capsys.readouterr().out


def test_the_check_reaches_every_kernel() -> None:
    """Decodes that are cut, prompts and chunks, and enough tokens for `new` to be read."""
    assert sum(n for n, _ in tune._CHECKED) >= TritonAttention.min_own_tokens
    assert {n == 1 for n, _ in tune._CHECKED} == {True, False}


def test_candidates_have_names_of_their_own() -> None:
    names = [tune._name(one) for one in (*tune.DECODES, *tune.PREFILLS)]
    assert len(set(names)) == len(names)


@without_gpu
def test_it_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no GPU" in capsys.readouterr().err
