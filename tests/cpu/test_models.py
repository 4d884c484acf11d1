"""Tiny models of every architecture give transformers' greedy tokens, however the work is cut into steps."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from octavo.engine.loop import Engine
from tiny_models import GREEDY, MODELS, NUM_TOKENS, WINDOW, Reference, run, start, tokens_of

NUM_GROUPS = {"qwen2-two-groups": 2}


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Engines put in here are ended after the test."""
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.scheduler.blocks.check()
        engine.shutdown()


@pytest.fixture
def engine(tiny: Reference, engines: list[Engine]) -> Engine:
    engines.append(start(tiny.path))
    return engines[0]


def test_reference_can_tell_models_apart(tiny: Reference) -> None:
    """Its tokens vary, no two answers are alike, none hangs on rounding, and prompts outgrow the window."""
    assert set(MODELS) >= {tiny.name}
    assert tiny.clear > 5e-4
    assert len({token for tokens in tiny.tokens for token in tokens}) > 200
    assert all(one != other for one, other in pairwise(sorted(tiny.tokens)))
    assert sum(len(prompt) > WINDOW for prompt in tiny.prompts) > 5


def test_groups_follow_the_windows(tiny: Reference, engine: Engine) -> None:
    windows = [group.window for group in engine.capacity.groups]
    expected = {"qwen2-two-groups": [None, WINDOW], "mistral-window": [WINDOW]}
    assert windows == expected.get(tiny.name, [None])


def test_all_at_once(tiny: Reference, engine: Engine) -> None:
    assert tokens_of(run(engine, tiny.prompts)) == tiny.tokens
    assert engine.stats().num_steps == NUM_TOKENS  # the whole batch moves together


def test_one_by_one(tiny: Reference, engine: Engine) -> None:
    for prompt, tokens in zip(tiny.prompts, tiny.tokens, strict=True):
        assert run(engine, [prompt])[0].token_ids == tokens


def test_prompts_in_chunks_of_7(tiny: Reference, engines: list[Engine]) -> None:
    engines.append(start(tiny.path, long_prefill_token_threshold=7, enable_prefix_caching=False))
    assert tokens_of(run(engines[0], tiny.prompts)) == tiny.tokens
    longest = max(map(len, tiny.prompts))
    assert engines[0].stats().num_steps == -(-longest // 7) + NUM_TOKENS - 1


def test_steps_of_7_tokens(tiny: Reference, engines: list[Engine]) -> None:
    engines.append(start(tiny.path, max_num_batched_tokens=7, enable_prefix_caching=False))
    assert tokens_of(run(engines[0], tiny.prompts)) == tiny.tokens
    computed = sum(map(len, tiny.prompts)) + len(tiny.prompts) * (NUM_TOKENS - 1)
    assert engines[0].stats().num_steps >= computed / 7


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("depth", [1, 3])
def test_preemption(tiny: Reference, engines: list[Engine], prefix_caching: bool, depth: int) -> None:
    engine = start(
        tiny.path,
        num_gpu_blocks_override=14 * NUM_GROUPS.get(tiny.name, 1),
        enable_prefix_caching=prefix_caching,
        max_steps_in_flight=depth,
    )
    engines.append(engine)
    assert tokens_of(run(engine, tiny.prompts)) == tiny.tokens
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_blocks_used == 0


def test_same_prompts_again(tiny: Reference, engine: Engine) -> None:
    first = run(engine, tiny.prompts)
    again = run(engine, tiny.prompts)
    assert tokens_of(first) == tokens_of(again) == tiny.tokens
    # At least one token is computed, so that a prompt of whole blocks hits all but its last one.
    assert [answer.num_cached for answer in again] == [(len(prompt) - 1) // 16 * 16 for prompt in tiny.prompts]


def test_shared_prefixes_of_one_step(tiny: Reference, engine: Engine) -> None:
    """The last four prompts share 48 tokens: three of them read what the first writes in the same step."""
    answers = run(engine, tiny.prompts[-4:])
    assert tokens_of(answers) == tiny.tokens[-4:]
    assert [answer.num_cached for answer in answers] == [0, 48, 48, 48]


def test_answers_as_prefixes(tiny: Reference, engine: Engine) -> None:
    """What was generated is found again, and goes on as it did."""
    run(engine, tiny.prompts)
    longer = [prompt + tokens[:40] for prompt, tokens in zip(tiny.prompts, tiny.tokens, strict=True)]
    rest = run(engine, longer, replace(GREEDY, max_tokens=NUM_TOKENS - 40))
    assert tokens_of(rest) == [tokens[40:] for tokens in tiny.tokens]
    assert engine.stats().num_cached_tokens > sum(map(len, tiny.prompts))


@pytest.mark.parametrize("options", [{}, {"long_prefill_token_threshold": 7}, {"num_gpu_blocks_override": 28}])
def test_unwritten_slots_may_hold_any_bits(tiny: Reference, engines: list[Engine], options: dict[str, int]) -> None:
    """A cache full of NaN, the null block too, changes nothing (contract C10)."""
    engines.append(start(tiny.path, **options))
    executor: Any = engines[0]._executor
    for cache in executor.runner.caches:
        cache.raw.fill_(0xFF)
    assert cache.k.isnan().all()
    assert tokens_of(run(engines[0], tiny.prompts)) == tiny.tokens


@pytest.mark.parametrize("depth", [2, 3])
def test_steps_in_flight(tiny: Reference, engines: list[Engine], depth: int) -> None:
    engines.append(start(tiny.path, max_steps_in_flight=depth, long_prefill_token_threshold=13))
    assert tokens_of(run(engines[0], tiny.prompts)) == tiny.tokens
    assert tokens_of(run(engines[0], tiny.prompts)) == tiny.tokens


@pytest.mark.parametrize("block_size", [8, 32])
def test_block_sizes(tiny: Reference, engines: list[Engine], block_size: int) -> None:
    engines.append(start(tiny.path, block_size=block_size))
    assert tokens_of(run(engines[0], tiny.prompts)) == tiny.tokens
    again = run(engines[0], tiny.prompts)
    assert tokens_of(again) == tiny.tokens
    assert again[-1].num_cached == (len(tiny.prompts[-1]) - 1) // block_size * block_size


def test_rows_are_taken_over(tiny: Reference, engines: list[Engine]) -> None:
    """Three rows serve sixteen requests of different lengths, each after the other."""
    engines.append(start(tiny.path, max_num_seqs=3, max_steps_in_flight=2))
    lengths = [NUM_TOKENS if i % 3 else 5 for i in range(len(tiny.prompts))]
    params = [replace(GREEDY, max_tokens=n) for n in lengths]
    answers = run(engines[0], tiny.prompts, params)
    assert tokens_of(answers) == [tokens[:n] for tokens, n in zip(tiny.tokens, lengths, strict=True)]
