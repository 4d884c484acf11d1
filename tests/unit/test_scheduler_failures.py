"""Prefix hits in the scheduler, and steps that fail: who ends, who starts again, and which hashes go."""

import pytest
from engine_helpers import Dictated, Rig, capacity_of
from octavo.engine.block_manager import KVGroup
from octavo.engine.step import StepInput

# -- prefix hits -----------------------------------------------------------------------------------------


def test_the_same_prompt_again_computes_its_last_tokens_only() -> None:
    rig = Rig(capacity_of(max_tokens=64))
    rig.add(12, max_tokens=1)
    rig.step()
    again = rig.add(12, max_tokens=1)
    step = rig.step()
    assert [(row.start, row.num_tokens) for row in step.rows] == [(8, 4)]
    assert rig.told(again).num_cached_tokens == 8
    longer = rig.add([*range(100, 112), 1], max_tokens=1)
    assert [(row.start, row.num_tokens) for row in rig.step().rows] == [(12, 1)]
    assert rig.told(longer).num_cached_tokens == 12
    assert rig.scheduler.counters.num_cached_tokens == 20
    rig.verify()


def test_a_prompt_that_is_still_in_flight_is_hit() -> None:
    rig = Rig()
    rig.add(9)
    rig.must_submit()
    rig.add(9)
    assert rig.must_submit().rows[-1].num_tokens == 1
    rig.run(2)


def test_one_step_may_write_a_block_and_read_it_for_another_request() -> None:
    rig = Rig()
    rig.add(10)
    rig.add(10)
    step = rig.must_submit()
    assert sorted(row.num_tokens for row in step.rows) == [2, 10]
    assert step.new_rows[1].blocks[0][:2] == step.new_rows[0].blocks[0][:2]
    rig.run(2)


def test_generated_tokens_are_hit_too() -> None:
    rig = Rig()
    name = rig.add(6, max_tokens=7)
    rig.run(2)
    rig.add([*range(100, 106), *rig.told(name).token_ids[:6]], max_tokens=1)
    assert rig.step().rows[0].start == 8
    rig.verify()


def test_other_salts_share_nothing() -> None:
    rig = Rig()
    for salt, start in (("", 0), ("a", 0), ("b", 0), ("a", 8), ("", 8)):
        rig.add(9, salt=salt, max_tokens=1)
        assert rig.step().rows[0].start == start
    rig.verify()


def test_choices_that_are_computed_again_do_not_count_as_cached_prompts() -> None:
    rig = Rig(capacity_of(num_blocks=9, max_model_len=32))
    rig.add(9, n=4, max_tokens=16)
    rig.run()
    counters = rig.scheduler.counters
    assert counters.num_preemptions > 0
    assert (counters.num_prompt_tokens, counters.num_cached_tokens) == (9, 0)


# -- failed steps ----------------------------------------------------------------------------------------


def failing(rig: Rig, how: str = "sample") -> StepInput:
    rig.executor.fail_next = how
    return rig.must_submit()


def test_a_failed_step_ends_its_requests_with_the_reason() -> None:
    rig = Dictated()
    rig.add(3, name="a")
    rig.go()
    rig.add(3, name="b")
    rig.go()
    rig.answer(50)
    events = rig.answer(error="the kernel broke")
    assert [(e.request_id, e.token_ids, e.finish_reason, e.error) for e in events] == [
        ("a", [], "error", "the kernel broke"),
        ("b", [], "error", "the kernel broke"),
    ]
    rig.verify_idle()


def test_every_choice_of_a_request_that_fails_before_it_forks_ends() -> None:
    rig = Dictated(capacity=capacity_of(max_tokens=4))
    rig.add(9, name="a", n=3)
    rig.go()
    events = rig.answer(error="no")
    assert [(event.choice, event.finish_reason) for event in events] == [(0, "error"), (1, "error"), (2, "error")]
    rig.verify_idle()


def test_choices_that_forked_fail_by_themselves() -> None:
    rig = Dictated()
    rig.add(3, name="a", n=2)
    rig.say(50, 51)
    rig.scheduler.abort("a", 0)
    rig.go()
    assert [event.choice for event in rig.answer(error="no")] == [1]
    rig.verify_idle()


def test_requests_outside_the_failed_step_go_on() -> None:
    rig = Rig()
    failed = rig.add(3, sync=True)
    rig.step()
    other = rig.add([5] * 9, sync=True)
    rig.must_submit()
    third = rig.add([6] * 9)
    failing(rig)
    rig.run(3)
    assert rig.told(third).finish_reason == "error"
    assert {rig.told(name).finish_reason for name in (failed, other)} == {"length"}
    assert rig.scheduler.counters.num_preemptions == 0


@pytest.mark.parametrize("how", ["submit", "sample"])
def test_hashes_of_a_failed_step_are_withdrawn(how: str) -> None:
    rig = Rig()
    rig.add(9)
    failing(rig, how)
    rig.deliver()
    rig.add(9)
    assert rig.step().rows[0].start == 0
    rig.run()


def test_hashes_of_steps_before_the_failed_one_stay() -> None:
    rig = Rig(capacity_of(max_tokens=8))
    rig.add(16)
    rig.step()
    failing(rig)
    rig.deliver()
    rig.add(16)
    assert rig.step().rows[0].start == 8
    rig.run()


def test_a_request_that_hit_blocks_of_the_failed_step_starts_again() -> None:
    rig = Rig()
    failed = rig.add(9)
    failing(rig)
    name = rig.add(9)
    assert rig.must_submit().rows[-1].start == 8
    rig.deliver()
    assert rig.told(failed).finish_reason == "error"
    assert [request.id for request in rig.scheduler.waiting] == [name]
    assert rig.must_submit().rows[0].start == 0
    rig.run(2)
    assert rig.told(name).finish_reason == "length"


def test_a_preempted_request_does_not_keep_tokens_that_build_on_the_failed_step() -> None:
    rig = Rig(capacity_of(num_blocks=8, max_requests=4, max_model_len=28))
    rig.add(10, max_tokens=8)
    rig.step()
    rig.add([9] * 9)
    failing(rig)
    name = rig.add([9] * 9)
    assert rig.must_submit().rows[-1].start == 8
    rig.must_submit()
    waiting = rig.scheduler.waiting[0]
    assert (waiting.id, waiting.num_in_flight) == (name, 1)
    rig.deliver()
    assert waiting.num_in_flight == 0
    rig.run(3)
    assert rig.told(name).finish_reason == "length"


def test_choices_that_forked_behind_the_failed_step_start_again() -> None:
    rig = Rig(capacity_of(max_tokens=5), prefix_caching=False)
    name = rig.add(8, n=2)
    failing(rig)
    assert rig.must_submit().forks
    rig.run(3)
    assert [rig.told(name, choice).finish_reason for choice in range(2)] == ["error", "length"]


def test_what_hides_behind_a_window_is_not_forgotten_when_a_step_fails() -> None:
    rig = Rig(capacity_of(groups=(KVGroup(3),), num_blocks=40))
    rig.add([9] * 5)
    failing(rig)
    rig.add([9] * 5)
    for _ in range(3):
        rig.must_submit()
    rig.run(4)


def test_a_request_that_hit_nothing_is_left_in_peace() -> None:
    rig = Rig()
    rig.add(9)
    failing(rig)
    name = rig.add([5] * 9)
    assert rig.must_submit().rows[-1].num_tokens == 9
    rig.deliver()
    assert [request.id for request in rig.scheduler.running] == [name]
    assert rig.scheduler.counters.num_preemptions == 0
    rig.run(2)


def test_a_request_that_hit_older_blocks_is_left_in_peace() -> None:
    rig = Rig()
    rig.add(9, max_tokens=1)
    rig.step()
    name = rig.add(9, max_tokens=9, sync=True)
    rig.must_submit()
    rig.add([5] * 9)
    failing(rig)
    while rig.outputs:
        rig.deliver()
    assert [request.id for request in rig.scheduler.running] == [name]
    assert rig.scheduler.counters.num_preemptions == 0
    rig.run(2)


def test_an_aborted_request_hears_nothing_of_the_failure() -> None:
    rig = Dictated()
    rig.add(3, name="a")
    rig.go()
    rig.scheduler.abort("a")
    assert rig.answer(error="no") == []
    rig.verify_idle()


def test_a_request_that_is_failed_while_it_waits_to_be_computed_again() -> None:
    rig = Rig(capacity_of(num_blocks=8, max_requests=4, max_model_len=28))
    rig.add(15, max_tokens=2)
    young = rig.add([1] * 11, max_tokens=9)
    rig.must_submit()
    failing(rig)
    assert rig.submit() is None
    assert rig.scheduler.waiting[0].id == young
    while rig.outputs:
        rig.deliver()
    assert rig.told(young).finish_reason == "error"
    rig.run()
