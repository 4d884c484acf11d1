"""What the output of a step means: ends, late tokens, aborts, prompt logprobs, and rows that wait for the host."""

import pytest
from engine_helpers import MAX_MODEL_LEN, Dictated, Rig, capacity_of
from hash_oracle import EOS, STOP
from octavo.engine.block_manager import KVGroup
from octavo.engine.step import PromptLogprobs, StepOutput, TokenEvent, TokenLogprob


def ends(events: list[TokenEvent]) -> list[tuple[str | None, int | str | None]]:
    return [(event.finish_reason, event.stop_reason) for event in events]


# -- ends ------------------------------------------------------------------------------------------------


def test_an_event_tells_the_token_and_choice_0_what_was_cached() -> None:
    rig = Dictated()
    rig.add(3, name="a", n=2, max_tokens=3)
    assert rig.say(50, 60) == [
        TokenEvent("a", 1, [50]),
        TokenEvent("a", 0, [60], num_cached_tokens=0),
    ]
    assert rig.say(61, 51) == [TokenEvent("a", 0, [61], num_cached_tokens=0), TokenEvent("a", 1, [51])]
    assert ends(rig.say(62, 52)) == [("length", None)] * 2
    assert not rig.scheduler.has_requests
    assert rig.scheduler.counters.num_generated_tokens == 6
    rig.verify_idle()


def test_logprobs_come_with_their_token() -> None:
    rig = Dictated()
    rig.add(3)
    rig.add(4)
    rig.go()
    logprob = TokenLogprob(-0.5, 1, [50], [-0.5])
    events = rig.scheduler.update(StepOutput(0, [50, 51], [logprob, None]))
    assert [event.logprobs for event in events] == [[logprob], []]


def test_the_caches_counts_are_kept_until_newer_ones_come() -> None:
    rig = Dictated()
    rig.add(3)
    found = []
    for number, counts in enumerate([(2, 100), None, (2, 250)]):
        rig.go()
        rig.scheduler.update(StepOutput(number, [50], kv_counts=counts))
        stats = rig.scheduler.snapshot()
        found.append((stats.num_kv_clipped, stats.num_kv_written))
    assert found == [(2, 100), (2, 100), (2, 250)]


def test_eos_ends_a_request_unless_it_is_ignored() -> None:
    rig = Dictated()
    rig.add(3, ignore_eos=False, max_tokens=9)
    rig.add(3, ignore_eos=True, max_tokens=9)
    assert ends(rig.say(50, 50)) == [(None, None)] * 2
    assert ends(rig.say(EOS, EOS)) == [("stop", None), (None, None)]
    assert len(rig.scheduler.running) == 1


def test_a_stop_token_ends_a_request_and_is_named() -> None:
    rig = Dictated()
    rig.add(3, stop_token_ids=(STOP, 50), max_tokens=9)
    rig.add(3, max_tokens=9)
    assert ends(rig.say(49, STOP)) == [(None, None)] * 2
    assert ends(rig.say(50, 50)) == [("stop", 50), (None, None)]


def test_min_tokens_holds_off_every_stop() -> None:
    rig = Dictated()
    rig.add(3, ignore_eos=False, stop_token_ids=(STOP,), min_tokens=3, max_tokens=9)
    assert ends(rig.say(EOS)) == [(None, None)]
    assert ends(rig.say(STOP)) == [(None, None)]
    assert ends(rig.say(EOS)) == [("stop", None)]


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    rig = Dictated()
    rig.add(3, ignore_eos=False, max_tokens=1)
    assert ends(rig.say(EOS)) == [("stop", None)]


def test_no_step_is_submitted_past_the_last_token() -> None:
    rig = Dictated()
    rig.add(3, max_tokens=2)
    rig.go()
    rig.go()
    assert rig.scheduler.schedule() is None
    rig.answer(50)
    assert ends(rig.answer(51)) == [("length", None)]
    rig.verify_idle()


def test_tokens_sampled_after_the_end_are_dropped_and_not_counted() -> None:
    rig = Dictated()
    rig.add(3, ignore_eos=False, max_tokens=9)
    for _ in range(3):
        rig.go()
    assert ends(rig.answer(EOS)) == [("stop", None)]
    assert rig.scheduler.schedule() is None
    assert rig.answer(51) == []
    assert rig.answer(52) == []
    assert rig.scheduler.counters.num_generated_tokens == 1
    rig.verify_idle()


def test_late_tokens_are_not_taken_for_those_of_the_rows_next_owner() -> None:
    rig = Dictated()
    rig.add(3, name="a", ignore_eos=False, max_tokens=9)
    rig.go()
    rig.go()
    rig.answer(EOS)
    rig.add(3, name="b", max_tokens=1)
    step = rig.go()
    assert [(row.row, row.start) for row in step.rows] == [(0, 0)]
    assert rig.answer(51) == []
    assert rig.answer(52) == [TokenEvent("b", 0, [52], finish_reason="length", num_cached_tokens=0)]
    rig.verify_idle()


def test_outputs_come_in_the_order_of_their_steps() -> None:
    rig = Dictated()
    rig.add(3)
    rig.go()
    with pytest.raises(AssertionError, match=r"^output of step 1, but 0 is the oldest$"):
        rig.scheduler.update(StepOutput(1))


# -- aborts ----------------------------------------------------------------------------------------------


def test_an_abort_ends_every_choice_at_once_and_without_an_event() -> None:
    rig = Dictated()
    rig.add(3, name="a", n=3)
    rig.add(3, name="b")
    rig.go()
    rig.scheduler.abort("a")
    assert [request.id for request in rig.scheduler.running] == ["b"]
    assert rig.answer(50, 50, 50, 60) == [TokenEvent("b", 0, [60], num_cached_tokens=0)]
    assert sorted(rig.go().freed_rows) == [0, 1, 2]
    rig.answer(61)


def test_one_choice_can_be_aborted() -> None:
    rig = Dictated()
    rig.add(3, name="a", n=3)
    rig.say(50, 50, 50)
    rig.scheduler.abort("a", 1)
    assert [request.choice for request in rig.scheduler.running] == [0, 2]
    rig.scheduler.abort("a", 0)
    assert [request.choice for request in rig.scheduler.running] == [2]
    assert [event.choice for event in rig.say(51)] == [2]


def test_a_waiting_request_can_be_aborted() -> None:
    rig = Dictated()
    rig.add(3, name="a")
    rig.add(4, name="b")
    rig.scheduler.abort("b")
    rig.scheduler.abort("unknown")
    assert [request.id for request in rig.scheduler.waiting] == ["a"]
    rig.scheduler.abort("a")
    assert not rig.scheduler.has_requests
    assert rig.scheduler.schedule() is None
    rig.verify_idle()


def test_an_abort_before_the_fork_frees_the_rows_of_all_choices() -> None:
    rig = Dictated(capacity=capacity_of(max_tokens=4))
    rig.add(9, name="a", n=4)
    rig.go()
    rig.scheduler.abort("a")
    assert rig.answer() == []
    rig.verify_idle()


# -- prompt logprobs -------------------------------------------------------------------------------------


def test_prompt_logprobs_are_told_by_chunk() -> None:
    rig = Rig(capacity_of(max_tokens=4), prefix_caching=True)
    rig.add([4] * 10, max_tokens=1)
    name = rig.add([4] * 10, prompt_logprobs=1, max_tokens=2)
    rig.run(2)
    assert len(rig.told(name).prompt_logprobs) == 9
    assert rig.told(name).num_cached_tokens == 0, "cached tokens have no logprobs"


def test_prompt_logprobs_are_told_once_though_the_prompt_is_computed_again() -> None:
    rig = Rig(capacity_of(num_blocks=9, max_model_len=32, max_tokens=6))
    rig.add(9, max_tokens=20)
    rig.step()
    name = rig.add([1] * 24, prompt_logprobs=1, max_tokens=6)
    rig.run(2)
    assert rig.scheduler.counters.num_preemptions > 0
    assert len(rig.told(name).prompt_logprobs) == 23


def test_a_choice_that_computes_the_prompt_again_tells_nothing_of_it() -> None:
    rig = Rig(capacity_of(num_blocks=12, max_model_len=32, max_tokens=24))
    rig.add(9, max_tokens=20)
    rig.step()
    name = rig.add([1] * 9, prompt_logprobs=1, max_tokens=14, n=3)
    rig.run(2)
    assert rig.scheduler.counters.num_preemptions > 0
    assert [len(rig.told(name, choice).prompt_logprobs) for choice in range(3)] == [8, 0, 0]


def test_what_was_told_of_the_prompt_is_cut_from_a_longer_chunk() -> None:
    rig = Dictated(capacity=capacity_of(max_tokens=4))
    rig.add(9, name="a", prompt_logprobs=1)
    told = [TokenLogprob(-float(i), 1, [], []) for i in range(9)]

    def prompt(start: int, end: int) -> list[TokenEvent]:
        tokens = [50] * len(rig.go().samples)
        return rig.scheduler.update(
            StepOutput(rig.in_flight.pop().step_id, tokens, [], [PromptLogprobs(0, start, told[start:end])])
        )

    assert prompt(1, 5) == [TokenEvent("a", 0, [], prompt_logprobs=told[1:5], num_cached_tokens=0)]
    assert prompt(3, 5) == []
    assert prompt(2, 7)[0] == TokenEvent("a", 0, [], prompt_logprobs=told[5:7], num_cached_tokens=0)


def test_prompt_logprobs_of_a_request_that_has_ended_are_dropped() -> None:
    rig = Dictated()
    rig.add(3, name="a", prompt_logprobs=1)
    step = rig.go()
    rig.scheduler.abort("a")
    dead = PromptLogprobs(0, 1, [TokenLogprob(-1.0, 1, [], [])])
    assert rig.scheduler.update(StepOutput(step.step_id, [50], [], [dead])) == []


# -- rows that wait for the host -------------------------------------------------------------------------


def test_a_sync_row_waits_for_its_token_and_the_others_do_not() -> None:
    rig = Rig()
    rig.add(3, sync=True)
    rig.add(3)
    assert [row.row for row in rig.must_submit().rows] == [0, 1]
    assert [row.row for row in rig.must_submit().rows] == [1]
    rig.deliver()
    assert [row.row for row in rig.must_submit().rows] == [0, 1]
    rig.run(3)


def test_a_sync_prompt_is_computed_in_chunks_without_waiting() -> None:
    rig = Rig(capacity_of(max_tokens=4))
    rig.add(10, sync=True, n=2)
    assert [rig.must_submit().num_tokens for _ in range(3)] == [4, 4, 2]
    assert rig.submit() is None
    rig.run(3)


# -- everything at once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("groups", [(KVGroup(),), (KVGroup(), KVGroup(6))])
def test_a_busy_engine_tells_the_oracles_tokens(depth: int, groups: tuple[KVGroup, ...]) -> None:
    rig = Rig(capacity_of(num_blocks=1 + 17 * len(groups), groups=groups, max_tokens=11, max_requests=6))
    for i in range(14):
        rig.add(
            [i % 3] * (6 + i) + [i % 4],
            n=1 + i % 3,
            seed=i,
            max_tokens=3 + 2 * i if i % 5 else None,
            ignore_eos=i % 2 == 0,
            stop_token_ids=(STOP,) if i % 3 else (),
            min_tokens=i % 4 if i % 5 else 0,
            prompt_logprobs=1 if i % 6 == 1 else None,
            logprobs=1,
            salt="salt" if i == 7 else "",
        )
        for _ in range(i % 3):
            if len(rig.outputs) < depth:
                rig.submit()
        if i % 4 == 3 and rig.outputs:
            rig.deliver()
    assert max(len(asked.prompt) for asked in rig.ledger.asked.values()) < MAX_MODEL_LEN
    rig.run(depth)
    assert rig.scheduler.counters.num_preemptions > 0
    assert rig.scheduler.counters.num_cached_tokens > 0
