"""The benchmarks' workloads: the same name is the same work, today and on another machine."""

import json
from hashlib import sha256

import pytest
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.models.llama import LlamaForCausalLM
from octavo_workbench.session import Session
from octavo_workbench.workloads import (
    LLAMA_8B,
    SHAPES,
    TINY,
    WORKLOADS,
    Job,
    fixed,
    model_of_shape,
    sharegpt_like,
    workload,
)

# sha256 of [[[token ids], output tokens], ...] as JSON: figures measured on other versions stay comparable.
HASHES = {
    "sharegpt512": "5f361c11afa31796593abcda6176527cd9b495c8b1573b92418511323a58b8a7",
    "decode_b1": "9b1188716d104658994725601bb83f61d50d283d8f6e3792322168526d630897",
    "decode_b32": "fb59eb3f5cde8ccd68515d8f567fd619f7d3b4886e56abf263f7b172f8a68f84",
    "decode_b256": "7bc2c50daaadc3d9fa6941ebe27a336f43823ee2143c0355b80fc85c5777f7c6",
    "prefill_8k": "aa1cb2979e2333f5c27f201c447ee838c2297388c3ab7d79455340c617ff1ebb",
}


def _hash(jobs: list[Job]) -> str:
    return sha256(json.dumps([[list(ids), count] for ids, count in jobs]).encode()).hexdigest()


def test_every_workload_has_a_hash() -> None:
    assert set(HASHES) == set(WORKLOADS)


@pytest.mark.parametrize("name", sorted(HASHES))
def test_token_ids_never_change(name: str) -> None:
    assert _hash(workload(name)) == HASHES[name]


def test_sharegpt_like_has_the_lengths_it_promises() -> None:
    jobs = sharegpt_like()
    prompts, outputs = [len(job.prompt_token_ids) for job in jobs], [job.num_output_tokens for job in jobs]
    assert len(jobs) == 512
    assert 190 < sum(prompts) / 512 < 270
    assert 150 < sum(outputs) / 512 < 230
    assert min(prompts + outputs) >= 4
    assert max(prompts + outputs) <= 1024


def test_fewer_requests_are_the_first_of_more() -> None:
    assert sharegpt_like(3) == sharegpt_like(5)[:3]


def test_sizes_name_a_workload() -> None:
    assert workload("3x7x2") == fixed(3, 7, 2)
    assert [(len(ids), count) for ids, count in workload("3x7x2")] == [(7, 2)] * 3


@pytest.mark.parametrize("name", ["decode_b2", "3x7", "3x0x2", "axbxc", ""])
def test_unknown_workloads_are_refused_with_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match="known are sharegpt512, decode_b1"):
        workload(name)


def test_the_nearest_workload_is_named() -> None:
    with pytest.raises(ConfigError, match=r"decode_b32'\?$"):
        workload("decode_b23")


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes_are_models_that_the_core_knows(name: str) -> None:
    shape = LlamaForCausalLM.read_config(SHAPES[name])
    assert (shape.num_layers, shape.hidden_size) == ((32, 4096) if name == "llama-8b" else (2, 64))


def test_llama_8b_has_eight_billion_weights() -> None:
    hidden, inner, vocab = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"], LLAMA_8B["vocab_size"]
    heads = (2 * LLAMA_8B["num_attention_heads"] + 2 * LLAMA_8B["num_key_value_heads"]) * LLAMA_8B["head_dim"]
    layer = hidden * (heads + 3 * inner)
    assert LLAMA_8B["num_hidden_layers"] * layer + 2 * vocab * hidden == pytest.approx(8.03e9, rel=0.001)


def test_a_shape_becomes_a_model_that_runs() -> None:
    with model_of_shape(TINY) as folder:
        config = EngineConfig(model=folder, load_format="dummy", device="cpu", max_num_seqs=4, progress=False)
        with Session(config) as session:
            run = session.run(workload("2x20x3"))
    assert (run.num_requests, run.num_prompt_tokens, run.num_output_tokens) == (2, 40, 6)
    assert run.num_steps == 3
    assert run.output_tokens_per_s == pytest.approx(6 / run.seconds)
    assert run.tokens_per_s == pytest.approx(46 / run.seconds)
