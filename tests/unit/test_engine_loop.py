"""The engine on an executor: what it refuses, several steps in flight, failures, seeds and its small services."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from engine_helpers import FULL, Ledger, capacity_of
from hash_model import HashExecutor
from hash_oracle import FIRST_SAMPLED, VOCAB_SIZE
from octavo.engine.block_manager import KVGroup
from octavo.engine.loop import Engine
from octavo.engine.scheduler import SchedulerLimits
from octavo.engine.step import StepOutput, TokenEvent
from octavo.errors import RequestError, StepError
from octavo.sampling_params import SamplingParams


class House:
    """An engine, its executor, and a ledger of what it told."""

    def __init__(
        self, *, lazy: bool = False, groups: tuple[KVGroup, ...] = FULL, depth: int | None = None, **engine: Any
    ) -> None:
        capacity = capacity_of(groups=groups, num_blocks=1 + 32 * len(groups))
        self.executor = HashExecutor(capacity, lazy=lazy)
        self.engine = Engine(self.executor, capacity, max_steps_in_flight=depth, **engine)
        self.ledger = Ledger(groups)

    def add(self, prompt: list[int], name: str = "", **params: Any) -> str:
        name = name or f"request-{len(self.ledger.asked)}"
        sampling = SamplingParams(**{"seed": 3, "ignore_eos": True, "max_tokens": 4} | params)
        self.engine.add_request(name, prompt, sampling)
        self.ledger.add(name, prompt, sampling, sampling.seed or 0, sampling.max_tokens or 0)
        return name

    def step(self) -> list[TokenEvent]:
        events = self.engine.step()
        self.ledger.take(events)
        return events

    def run(self) -> None:
        while self.engine.has_work():
            self.step()
        assert self.executor.violations == []
        self.ledger.verify()


def numbers(value: object) -> Iterator[int]:
    """All integers in plain data."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        yield from numbers([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from numbers(getattr(value, field.name))


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "field", "message"),
    [
        ([], {}, "prompt", "The prompt is empty"),
        ([1] * 64, {}, "prompt", "The prompt has 64 tokens, but the model's context of 64 must hold it and one more"),
        ([1] * 60, {"max_tokens": 5}, "max_tokens", "together 65, but the model's context is 64"),
        ([1, VOCAB_SIZE], {}, "prompt", f"token id {VOCAB_SIZE}"),
        ([-1], {}, "prompt", "token id -1"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids", f"token id {VOCAB_SIZE}"),
        ([1], {"logprobs": 6}, "logprobs", "logprobs is 6, but at most 5"),
        ([1], {"prompt_logprobs": 6}, "prompt_logprobs", "prompt_logprobs is 6, but at most 5"),
        ([1], {"n": 9}, "n", "n is 9, but the engine runs at most 8 requests at once"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_field(
    prompt: list[int], params: dict[str, Any], field: str, message: str
) -> None:
    engine = House(max_logprobs=5).engine
    with pytest.raises(RequestError, match=message) as refusal:
        engine.add_request("a", prompt, SamplingParams(**params))
    assert refusal.value.field == field
    assert not engine.has_work()
    assert engine.stats().num_prompt_tokens == 0


def test_what_just_fits_is_served() -> None:
    house = House(max_logprobs=5)
    house.add([1] * 63, max_tokens=1, logprobs=5)
    house.add([1] * 60, max_tokens=4, n=8)
    house.add([0, VOCAB_SIZE - 1])
    house.run()


def test_the_number_of_choices_is_limited_by_the_schedulers_rows() -> None:
    house = House(limits=SchedulerLimits(max_requests=2, max_tokens=8))
    with pytest.raises(RequestError, match="at most 2 requests"):
        house.add([1], n=3)
    house.add([1] * 20, n=2)
    house.run()
    assert max(step.num_tokens for step in house.executor.steps) == 8


def test_without_max_tokens_a_request_fills_the_context() -> None:
    house = House()
    house.engine.add_request("a", [1] * 50, SamplingParams(max_tokens=None, ignore_eos=True))
    count = 0
    while house.engine.has_work():
        count += sum(len(event.token_ids) for event in house.engine.step())
    assert count == 14


def test_the_engine_keeps_a_prompt_of_its_own() -> None:
    house = House()
    prompt = [1, 2, 3]
    name = house.add(prompt, max_tokens=2)
    house.ledger.asked[name].prompt = [1, 2, 3]
    prompt[0] = 9
    house.run()


# -- several steps in flight -----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_are_submitted_before_the_first_is_back(depth: int) -> None:
    house = House(lazy=True, depth=depth)
    house.add([1, 2, 3], max_tokens=6)
    house.run()
    log = house.executor.log
    first = [log.index(("resolve", step)) for step in range(6)]
    ahead = [sum(1 for what, _ in log[:index] if what == "submit") - step for step, index in enumerate(first)]
    assert ahead == [min(depth, 6 - step) for step in range(6)]


def test_the_next_step_is_submitted_first_and_holds_no_token_values() -> None:
    house = House(lazy=True, depth=2, groups=(KVGroup(), KVGroup(6)))
    for i in range(3):
        house.add([5 + i] * (3 + i), n=1 + i, max_tokens=8, logprobs=1)
    house.run()
    log = house.executor.log
    last = house.executor.steps[-1].step_id
    for step in range(last):
        assert log.index(("submit", step + 1)) < log.index(("resolve", step))
    assert not [n for step in house.executor.steps for n in numbers(step) if n >= FIRST_SAMPLED]
    assert all(not step.set_tokens for step in house.executor.steps)
    assert sum(len(step.samples) for step in house.executor.steps) >= 6 * 8


def test_the_depth_is_the_executors_unless_it_is_given() -> None:
    house = House(lazy=True)
    house.add([1], max_tokens=6)
    house.step()
    assert len(house.executor.steps) == house.engine.capacity.max_steps_in_flight == 2
    deeper = House(lazy=True, depth=4)
    deeper.add([1], max_tokens=6)
    deeper.step()
    assert len(deeper.executor.steps) == 4


def test_a_late_stop_loses_the_tokens_behind_it() -> None:
    house = House(lazy=True, depth=3)
    names = [house.add([seed], seed=seed, max_tokens=60, ignore_eos=False) for seed in range(6)]
    house.run()
    reasons = {house.ledger.asked[name].choices[0].finish_reason for name in names}
    assert "stop" in reasons
    sampled = sum(len(step.samples) for step in house.executor.steps)
    assert sampled > house.engine.stats().num_generated_tokens


def test_steps_in_flight_are_work_though_no_request_is_left() -> None:
    house = House(lazy=True, depth=2)
    name = house.add([1], max_tokens=9)
    house.step()
    house.engine.abort(name)
    house.ledger.abort(name)
    assert house.engine.has_work()
    assert house.step() == []
    assert not house.engine.has_work()
    assert house.step() == []
    house.run()


def test_one_choice_can_be_aborted() -> None:
    house = House()
    name = house.add([1], n=2)
    house.step()
    house.engine.abort(name, 1)
    house.ledger.abort(name, 1)
    house.run()
    assert [len(told.token_ids) for told in house.ledger.asked[name].choices] == [4, 1]


# -- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["submit", "sample"])
def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(how: str) -> None:
    house = House(depth=2)
    failed = house.add([1, 2, 3])
    house.executor.fail_next = how
    house.step()
    later = house.add([1, 2, 3])
    house.run()
    told = house.ledger.asked[failed].choices[0]
    assert told.finish_reason == "error"
    assert told.error == (
        "The step failed with RuntimeError: step 0 is refused" if how == "submit" else "step 0 failed"
    )
    assert house.ledger.asked[later].choices[0].finish_reason == "length"


def test_no_step_is_submitted_behind_a_refused_one() -> None:
    house = House(depth=3)
    house.add([1, 2, 3], max_tokens=9)
    house.step()
    assert len(house.executor.steps) == 3
    house.executor.fail_next = "submit"
    for told in (3 + 1, 3 + 1, 3 + 1):
        assert house.step()
        assert len(house.executor.steps) == told
    assert not house.engine.has_work()
    house.add([1, 2, 3], max_tokens=9)
    house.step()
    assert len(house.executor.steps) == 4 + 3, "the failure is over"
    house.run()


class BrokenFuture(HashExecutor):
    """Its outputs end in an exception, as those of a worker that died do."""

    error: Exception = ConnectionError("rank 1 is gone")

    def sample(self, handle: object, masks: object | None = None) -> Future[StepOutput]:
        future: Future[StepOutput] = Future()
        future.set_exception(self.error)
        return future


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("rank 1 is gone"), "The step failed with ConnectionError: rank 1 is gone"),
        (StepError("The attention backend failed in layer 3."), "The attention backend failed in layer 3."),
    ],
)
def test_an_exception_in_the_output_fails_the_step(error: Exception, told: str) -> None:
    executor = BrokenFuture(capacity_of())
    executor.error = error
    engine = Engine(executor, capacity_of())
    engine.add_request("a", [1], SamplingParams(n=2))
    events = [event for _ in range(2) for event in engine.step()]
    ends = [(event.choice, event.finish_reason, event.error) for event in events]
    assert sorted(ends) == [(0, "error", told), (1, "error", told)]
    while engine.has_work():
        engine.step()


def test_blocks_are_checked_when_the_engine_becomes_idle() -> None:
    house = House(depth=1)
    house.add([1], max_tokens=1)
    house.engine.scheduler.blocks.pool.take()
    with pytest.raises(AssertionError, match="1 blocks are held, but no request is there"):
        house.engine.step()


# -- seeds -----------------------------------------------------------------------------------------------


def drawn_seeds(seed: int) -> list[int]:
    house = House(seed=seed)
    for name in "ab":
        house.engine.add_request(name, [1], SamplingParams())
    return [request.seed for request in house.engine.scheduler.waiting]


def test_requests_without_a_seed_draw_theirs_from_the_engines() -> None:
    first = drawn_seeds(1)
    assert first[0] != first[1]
    assert drawn_seeds(1) == first
    assert set(drawn_seeds(2)).isdisjoint(first)
    assert all(0 <= seed < 2**63 for seed in first)
    assert max(first) > 2**32


def test_a_seed_of_its_own_is_kept_and_0_is_one() -> None:
    engine = House().engine
    for seed in (0, 7):
        engine.add_request("a", [1], SamplingParams(seed=seed))
    assert [request.seed for request in engine.scheduler.waiting] == [0, 7]


def test_choices_are_those_of_separate_runs_with_their_seeds() -> None:
    from octavo.sampling_params import choice_seed

    together, alone = House(prefix_caching=False), House(prefix_caching=False)
    name = together.add([4] * 20, n=8, seed=11, max_tokens=6)
    names = [alone.add([4] * 20, seed=choice_seed(11, choice), max_tokens=6) for choice in range(8)]
    together.run()
    alone.run()
    texts = [told.token_ids for told in together.ledger.asked[name].choices]
    assert texts == [alone.ledger.asked[other].choices[0].token_ids for other in names]


# -- services --------------------------------------------------------------------------------------------


def test_prefixes_are_forgotten_on_request_but_not_while_requests_run() -> None:
    house = House()
    house.add([1] * 20, max_tokens=2)
    house.step()
    assert house.engine.reset_prefix_cache() is False
    house.run()
    house.add([1] * 20, max_tokens=2)
    house.run()
    cached = house.engine.stats().num_cached_tokens
    assert cached >= 16
    assert house.engine.reset_prefix_cache() is True
    house.add([1] * 20, max_tokens=2)
    house.run()
    assert house.engine.stats().num_cached_tokens == cached


def test_prefix_caching_can_be_off() -> None:
    house = House(prefix_caching=False)
    for _ in range(2):
        house.add([1] * 20, max_tokens=2)
        house.run()
    assert house.engine.stats().num_cached_tokens == 0


def test_salts_and_priorities_reach_the_scheduler() -> None:
    limits = SchedulerLimits(max_requests=1, max_tokens=32, by_priority=True)
    engine = House(limits=limits).engine
    engine.add_request("a", [1] * 9, SamplingParams(max_tokens=1), priority=2, cache_salt="x")
    engine.add_request("b", [1] * 9, SamplingParams(max_tokens=1), priority=1, cache_salt="x")
    engine.add_request("c", [1] * 9, SamplingParams(max_tokens=1), priority=3)
    order: list[tuple[str, int | None]] = []
    while engine.has_work():
        order += [(event.request_id, event.num_cached_tokens) for event in engine.step()]
    assert order == [("b", 0), ("a", 8), ("c", 0)]


def test_requests_that_begin_to_run_are_named_once() -> None:
    house = House(depth=1, limits=SchedulerLimits(max_requests=2, max_tokens=8))
    house.add([1], "a", n=2, max_tokens=2)
    house.add([1], "b", max_tokens=1)
    started = []
    while house.engine.has_work():
        house.step()
        started.append(list(house.engine.started))
    assert started == [["a"], [], ["b"]]


def test_health_and_shutdown_are_the_executors() -> None:
    house = House()
    assert house.engine.health() is None
    house.executor.unwell = "rank 1 does not answer"
    assert house.engine.health() == "rank 1 does not answer"
    order: list[bool] = []
    house.executor.running = True
    house.engine.shutdown()
    assert not house.executor.running
    house.executor.running = True
    house.engine.on_shutdown = lambda: order.append(house.executor.running)
    house.engine.shutdown()
    assert order == [True], "the listener is told while the executor still runs"
