"""Whole requests on a tiny model: stops, seeds, choices and logprobs, the same however the work is cut into steps."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from octavo.engine.loop import Engine
from octavo.engine.step import TokenLogprob
from octavo.sampling_params import SamplingParams, choice_seed
from tiny_models import (
    GREEDY,
    NUM_TOKENS,
    VOCAB_SIZE,
    Answer,
    Reference,
    build,
    run,
    run_choices,
    start,
    tokens_of,
)

WAYS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.02},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"logit_bias": {5: 6.0}},
    {"allowed_token_ids": tuple(range(0, VOCAB_SIZE, 2))},
    {"min_tokens": 40, "stop_token_ids": tuple(range(100, 200))},
    {"temperature": 0.0, "frequency_penalty": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.2, "logprobs": 2},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 100, "repetition_penalty": 1.1},
    {"temperature": 0.0},
    {"frequency_penalty": 0.2, "presence_penalty": 0.2, "prompt_logprobs": 1},
]
"""Every way to sample; penalties and masks depend on what came before."""

MIXED = [SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=i, **params) for i, params in enumerate(WAYS)]


@pytest.fixture
def engine(llama: Reference) -> Iterator[Engine]:
    engine = start(llama.path)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def alone(llama: Reference) -> list[Answer]:
    """Each prompt by itself, with the parameters of MIXED."""
    engine = start(llama.path, enable_prefix_caching=False)
    return [run(engine, [prompt], params)[0] for prompt, params in zip(llama.prompts, MIXED, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"long_prefill_token_threshold": 7, "max_steps_in_flight": 3},
        {"num_gpu_blocks_override": 14},
        {"num_gpu_blocks_override": 14, "max_steps_in_flight": 3},
    ],
    ids=["at-once", "steps-of-7", "chunks-of-7", "preempted", "preempted-in-flight"],
)
def test_sampled_tokens_do_not_depend_on_steps(llama: Reference, alone: list[Answer], options: dict[str, Any]) -> None:
    engine = start(llama.path, **options)
    for _ in range(2):  # the second time with prefix hits
        answers = run(engine, llama.prompts, MIXED)
        assert tokens_of(answers) == tokens_of(alone)
        assert [len(one.logprobs) for one in answers] == [len(one.logprobs) for one in alone]
        assert_close(answers[-1].prompt_logprobs, alone[-1].prompt_logprobs)
    assert ("num_gpu_blocks_override" in options) == (engine.stats().num_preemptions > 0)


def test_parameters_change_the_tokens(llama: Reference, alone: list[Answer]) -> None:
    """Otherwise the test above would compare nothing."""
    differ = [one.token_ids != tokens for one, tokens in zip(alone, llama.tokens, strict=True)]
    assert differ.count(False) == 1
    assert not differ[14]
    assert all(token % 2 == 0 for token in alone[9].token_ids)


def test_unseeded_requests_differ_and_engines_repeat_them(llama: Reference) -> None:
    prompts = [llama.prompts[8]] * 4
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    first, same, other = (tokens_of(run(start(llama.path, seed=seed), prompts, params)) for seed in (1, 1, 2))
    assert first == same != other
    assert len({tuple(tokens) for tokens in first}) == 4


@pytest.fixture
def stopping(llama: Reference, tmp_path: Path) -> Path:
    """The model with two eos tokens, one in each of its configs: those that answers 9 and 10 reach after a while."""
    copytree(llama.path, tmp_path, dirs_exist_ok=True)
    for name, answer in (("config.json", 9), ("generation_config.json", 10)):
        eos = llama.tokens[answer][new_token(llama.tokens[answer], 20)]
        config = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(config | {"eos_token_id": [eos] if answer == 10 else eos}))
    return tmp_path


def new_token(tokens: list[int], first: int) -> int:
    """The first index, from `first` on, of a token that has not come before."""
    return next(i for i in range(first, len(tokens)) if tokens[i] not in tokens[:i])


@pytest.mark.parametrize("answer", [9, 10])
@pytest.mark.parametrize("depth", [1, 3])
def test_stops(llama: Reference, stopping: Path, depth: int, answer: int) -> None:
    """A stop token ends the answer with itself; min_tokens and ignore_eos put it off."""
    engine = start(stopping, max_steps_in_flight=depth)
    tokens = llama.tokens[answer]
    eos, stop = new_token(tokens, 20), new_token(tokens, 10)
    assert stop < eos < NUM_TOKENS - 1
    greedy = replace(GREEDY, ignore_eos=False)
    params = [
        greedy,
        GREEDY,
        replace(greedy, stop_token_ids=(tokens[stop],)),
        replace(greedy, min_tokens=eos + 1),
        replace(greedy, max_tokens=1),
    ]
    by_eos, ignored, by_token, late, one = run(engine, [llama.prompts[answer]] * 5, params)
    assert (by_eos.token_ids, by_eos.finish_reason, by_eos.stop_reason) == (tokens[: eos + 1], "stop", None)
    assert (ignored.token_ids, ignored.finish_reason) == (tokens, "length")
    assert (by_token.token_ids, by_token.stop_reason) == (tokens[: stop + 1], tokens[stop])
    assert late.token_ids[:eos] == tokens[:eos]
    assert late.token_ids[eos] != tokens[eos]
    assert (one.token_ids, one.finish_reason) == (tokens[:1], "length")
    assert engine.stats().num_blocks_used == 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_equal_separate_runs(llama: Reference, depth: int, prefix_caching: bool) -> None:
    """Six choices share the prompt's blocks; the first writers of its last block copy it."""
    prompt = llama.prompts[-1][:105]
    params = SamplingParams(n=6, max_tokens=30, ignore_eos=True, seed=11, frequency_penalty=0.5)
    engine = start(llama.path, max_steps_in_flight=depth, enable_prefix_caching=prefix_caching)
    (choices,) = run_choices(engine, [prompt], params)
    stats = engine.stats()
    assert (stats.num_prompt_tokens_computed, stats.num_copies) == (105, 5)
    separate = [replace(params, n=1, seed=choice_seed(11, j)) for j in range(6)]
    assert tokens_of(choices) == tokens_of(run(start(llama.path), [prompt] * 6, separate))
    assert len({tuple(tokens) for tokens in tokens_of(choices)}) == 6


def test_choices_survive_preemption(llama: Reference) -> None:
    params = [SamplingParams(n=4, max_tokens=40, ignore_eos=True, seed=i, presence_penalty=0.5) for i in range(4)]
    small, large = start(llama.path, num_gpu_blocks_override=13), start(llama.path)
    prompts = llama.prompts[8:12]
    assert [tokens_of(one) for one in run_choices(small, prompts, params)] == [
        tokens_of(one) for one in run_choices(large, prompts, params)
    ]
    assert small.stats().num_preemptions > 0


def hf_logprobs(llama: Reference, token_ids: list[int]) -> torch.Tensor:
    """[tokens, V]: log-probabilities of each next token by transformers' logits."""
    with torch.no_grad():
        return torch.log_softmax(build(llama.name)(torch.tensor([token_ids])).logits[0].double(), dim=-1)


def assert_right(told: TokenLogprob, wanted: torch.Tensor, token: int, number: int) -> None:
    """A told logprob of `token` against all of them."""
    assert told.logprob == pytest.approx(wanted[token].item(), abs=1e-3)
    assert told.rank == (wanted > wanted[token]).sum() + 1
    assert told.top_ids == wanted.topk(number).indices.tolist()
    assert told.top_logprobs == pytest.approx(wanted.topk(number).values.tolist(), abs=1e-3)


def assert_close(some: list[TokenLogprob], others: list[TokenLogprob]) -> None:
    """Two lists of logprobs that different batches computed."""
    for one, other in zip(some, others, strict=True):
        assert (one.rank, one.top_ids) == (other.rank, other.top_ids)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"long_prefill_token_threshold": 7}, {"max_steps_in_flight": 3}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_transformers(llama: Reference, options: dict[str, Any], temperature: float) -> None:
    params = replace(GREEDY, temperature=temperature, seed=3, logprobs=5, prompt_logprobs=3)
    prompts = llama.prompts[-2:]
    for prompt, answer in zip(prompts, run(start(llama.path, **options), prompts, params), strict=True):
        known = prompt + answer.token_ids
        wanted = hf_logprobs(llama, known)
        assert len(answer.prompt_logprobs) == len(prompt) - 1
        for position, told in enumerate(answer.prompt_logprobs, 1):
            assert_right(told, wanted[position - 1], known[position], 3)
        assert len(answer.logprobs) == NUM_TOKENS
        for position, told in enumerate(answer.logprobs, len(prompt)):
            assert_right(told, wanted[position - 1], known[position], 5)


def test_no_prompt_logprobs_of_one_token(llama: Reference, engine: Engine) -> None:
    (answer,) = run(engine, [llama.prompts[0]], replace(GREEDY, prompt_logprobs=2))
    assert answer.prompt_logprobs == []
    assert answer.token_ids == llama.tokens[0]
