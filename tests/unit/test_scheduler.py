"""What a step holds: the budget and its order, chunks, admission, priorities, preemption and forks."""

from dataclasses import replace
from typing import Any

import pytest
from engine_helpers import rig_of, shares
from octavo.engine.block_manager import KVGroup
from octavo.engine.request import Status
from octavo.engine.scheduler import Counters
from octavo.engine.step import NewRow, SampleRow, SampleRows, ScheduledRow, ScheduledRows, StepInput, TableChange
from octavo.sampling_params import SamplingParams

# -- one request -----------------------------------------------------------------------------------------


def test_a_request_in_plain_data() -> None:
    rig = rig_of(num_blocks=20)
    rig.add([5, 6, 7, 8, 9], name="a", seed=42, max_tokens=2)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    assert rig.step() == StepInput(
        0,
        new_rows=[NewRow(0, [5, 6, 7, 8, 9], 5, [[1, 2]], params, 42, 0)],
        rows=ScheduledRows.of(ScheduledRow(0, 0, 5)),
        samples=SampleRows.of(SampleRow(0, 0, 5)),
    )
    assert rig.step() == StepInput(
        1, rows=ScheduledRows.of(ScheduledRow(0, 5, 1)), samples=SampleRows.of(SampleRow(0, 0, 6))
    )
    assert rig.scheduler.schedule() is None
    assert not rig.scheduler.has_requests
    rig.add([5], name="b", seed=1, max_tokens=1)
    step = rig.step()
    assert (step.step_id, step.freed_rows, step.num_tokens) == (2, [], 1)
    assert [new.row for new in step.new_rows] == [0]
    rig.verify()


def test_an_idle_scheduler_has_no_step() -> None:
    rig = rig_of()
    assert rig.submit() is None
    assert not rig.scheduler.has_requests
    rig.verify()


def test_tables_grow_with_the_tokens() -> None:
    rig = rig_of(num_blocks=20)
    rig.add(8, max_tokens=6)
    assert rig.step().new_rows[0].blocks == [[1, 2]]
    changes = [rig.step().table_changes for _ in range(5)]
    assert changes == [[TableChange(0, 0, 2, [3])], [], [], [], [TableChange(0, 0, 3, [4])]]
    rig.verify()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "groups", [(KVGroup(),), (KVGroup(), KVGroup(6)), (KVGroup(), KVGroup(5)), (KVGroup(), KVGroup(7))]
)
def test_the_short_way_of_decodes_gives_the_steps_of_the_long_one(depth: int, groups: tuple[KVGroup, ...]) -> None:
    def steps(short: bool) -> list[tuple[Any, ...]]:
        rig = rig_of(prefix_caching=True, num_blocks=24, groups=groups)
        if not short:
            rig.blocks.room = lambda key: 0  # type: ignore[method-assign]
        for number in range(9):
            rig.add([*range(number % 4, 7 + number)], n=1 + number % 2, max_tokens=9, sync=number % 5 == 4)
        num_steady = 0
        while rig.scheduler.has_requests or rig.outputs:
            while len(rig.outputs) < depth and rig.submit() is not None:
                num_steady += sum(request.num_computed < request.steady_end for request in rig.scheduler.running)
            rig.deliver()
        rig.verify()
        assert (num_steady > 0) == short
        assert rig.scheduler.counters.num_preemptions and rig.scheduler.counters.num_cached_tokens
        # The short way's rows come first; otherwise nothing differs.
        return [(replace(s, rows=None, samples=None), sorted(s.rows), sorted(s.samples)) for s in rig.executor.steps]

    assert steps(short=True) == steps(short=False)


def test_the_gauges_count_what_steady_requests_have_written() -> None:
    rig = rig_of(num_blocks=20, block_size=8)
    rig.add(5, max_tokens=9)
    found = []
    for _ in range(4):
        rig.step()
        stats = rig.scheduler.snapshot()
        found.append((stats.kv_tokens, stats.kv_slots))
    assert found == [(5, 8), (6, 8), (7, 8), (8, 8)]


def test_freed_rows_are_told_by_the_next_step() -> None:
    rig = rig_of()
    rig.add(3, max_tokens=1)
    rig.add(3, max_tokens=2)
    assert rig.step().freed_rows == []
    assert rig.step().freed_rows == [0]
    rig.verify()


# -- budget and chunks -----------------------------------------------------------------------------------


def test_a_long_prompt_is_split_over_steps() -> None:
    rig = rig_of(max_tokens=8)
    rig.add(20, max_tokens=2)
    steps = [rig.step() for _ in range(4)]
    assert [(row.start, row.num_tokens) for step in steps for row in step.rows] == [(0, 8), (8, 8), (16, 4), (20, 1)]
    assert [len(step.samples) for step in steps] == [0, 0, 1, 1]
    rig.verify()
    assert rig.scheduler.counters == Counters(
        num_prompt_tokens=20, num_prompt_tokens_computed=20, num_generated_tokens=2, num_steps=4
    )


def test_running_requests_are_served_before_waiting_ones() -> None:
    rig = rig_of(max_tokens=6)
    rig.add(4)
    rig.step()
    rig.add(9)
    rig.add(2)
    assert shares(rig.step()) == {0: 1, 1: 5}
    assert shares(rig.step()) == {0: 1, 1: 4, 2: 1}
    rig.run()


def test_rows_of_one_token_come_first() -> None:
    rig = rig_of(max_tokens=7)
    rig.add(2, max_tokens=9)
    rig.step()
    rig.add(9)
    rig.step()
    rig.add(1)
    step = rig.step()
    assert [(row.row, row.num_tokens) for row in step.rows] == [(0, 1), (2, 1), (1, 3)]
    rig.run()


def test_the_budget_is_spent_to_the_last_token_and_no_further() -> None:
    rig = rig_of(max_tokens=6)
    for _ in range(3):
        rig.add(2)
    rig.add(5)
    step = rig.step()
    assert step.num_tokens == 6
    assert shares(step) == {0: 2, 1: 2, 2: 2}
    assert shares(rig.step()) == {0: 1, 1: 1, 2: 1, 3: 3}
    rig.run()


def test_requests_beyond_the_budget_wait_for_their_turn() -> None:
    rig = rig_of(max_tokens=2)
    for _ in range(3):
        rig.add(1, max_tokens=3)
    assert shares(rig.step()) == {0: 1, 1: 1}
    assert shares(rig.step()) == {0: 1, 1: 1}
    assert rig.scheduler.snapshot().num_waiting == 1
    rig.run()


def test_a_prompt_may_have_a_limit_of_its_own() -> None:
    rig = rig_of(max_tokens=16, limits={"max_tokens_per_prompt": 3})
    rig.add(7)
    rig.add(4)
    assert [shares(rig.step()) for _ in range(3)] == [{0: 3, 1: 3}, {0: 3, 1: 1}, {0: 1, 1: 1}]
    rig.run()


def test_a_limit_of_one_token_a_prompt() -> None:
    rig = rig_of(max_tokens=16, limits={"max_tokens_per_prompt": 1})
    rig.add(3, max_tokens=2)
    assert [shares(rig.step()) for _ in range(4)] == [{0: 1}] * 4
    rig.verify()


def test_without_chunks_a_prompt_waits_until_it_fits_whole() -> None:
    rig = rig_of(max_tokens=8, limits={"chunked_prefill": False})
    rig.add(5)
    rig.add(4)
    rig.add(1)
    assert shares(rig.step()) == {0: 5}
    assert shares(rig.step()) == {0: 1, 1: 4, 2: 1}
    rig.run()


def test_without_chunks_a_prompt_of_the_whole_budget_fits() -> None:
    rig = rig_of(max_tokens=8, limits={"chunked_prefill": False})
    rig.add(8, max_tokens=1)
    assert shares(rig.step()) == {0: 8}
    rig.verify()


# -- admission -------------------------------------------------------------------------------------------


def test_requests_start_in_the_order_of_arrival() -> None:
    rig = rig_of(max_requests=2)
    names = [rig.add(3, max_tokens=2 + i) for i in range(4)]
    rig.step()
    assert [request.id for request in rig.scheduler.running] == names[:2]
    assert [request.id for request in rig.scheduler.waiting] == names[2:]
    rig.run()


def test_with_priorities_the_lowest_number_starts_first() -> None:
    rig = rig_of(max_requests=2, limits={"by_priority": True})
    late, first, second = (rig.add(3, priority=priority) for priority in (2, 1, 1))
    rig.step()
    assert [request.id for request in rig.scheduler.running] == [first, second]
    assert [request.id for request in rig.scheduler.waiting] == [late]
    rig.run()


def test_without_that_policy_priorities_have_no_effect() -> None:
    rig = rig_of(max_requests=1)
    first = rig.add(3, priority=9)
    rig.add(3, priority=0)
    rig.step()
    assert [request.id for request in rig.scheduler.running] == [first]
    rig.run()


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    rig = rig_of(num_blocks=17, max_requests=4, max_tokens=64)
    rig.add(40, max_tokens=3)
    rig.step()
    rig.add(30)
    rig.add(1)
    assert shares(rig.step()) == {0: 1}
    assert [request.status for request in rig.scheduler.waiting] == [Status.WAITING] * 2
    rig.run()


def test_a_request_waits_until_there_is_a_row_for_every_choice() -> None:
    rig = rig_of(max_requests=3)
    rig.add(2, n=2, max_tokens=2)
    rig.add(2, n=2, max_tokens=2)
    assert shares(rig.step()) == {0: 2}
    rig.step()
    assert rig.scheduler.snapshot().num_waiting == 1
    assert len(rig.step().new_rows) == 1
    rig.run()


def test_a_request_that_does_not_fit_leaves_everything_as_it_was() -> None:
    rig = rig_of(num_blocks=17, max_tokens=80)
    rig.add(60, max_tokens=2)
    rig.add(9)
    rig.step()
    waiting = rig.scheduler.waiting[0]
    assert (waiting.num_computed, waiting.status, waiting.row) == (0, Status.WAITING, -1)
    assert rig.blocks.pool.num_used == 15
    rig.run()


@pytest.mark.parametrize("num_tokens", [9, 10])
def test_nobody_begins_with_one_token_behind_blocks_that_the_step_fills(num_tokens: int) -> None:
    """Blocks of four: of two equal prompts of nine tokens the second computes a block that it could have had."""
    rig = rig_of(prefix_caching=True)
    for _ in range(2):
        rig.add([7] * num_tokens, max_tokens=3)
    rig.add([5])
    assert shares(rig.step()) == {0: num_tokens, 1: 5 if num_tokens == 9 else 2, 2: 1}
    rig.run()


def test_a_budget_of_one_token_is_not_spent_behind_blocks_that_the_step_fills() -> None:
    rig = rig_of(prefix_caching=True, max_tokens=11)
    for _ in range(2):
        rig.add([7] * 10, max_tokens=3)
    assert shares(rig.step()) == {0: 10}
    assert shares(rig.step()) == {0: 1, 1: 2}
    rig.run()


# -- preemption ------------------------------------------------------------------------------------------


def test_the_youngest_gives_its_blocks_back_and_is_recomputed() -> None:
    rig = rig_of(num_blocks=8, max_model_len=28)
    old, young = rig.add(11, max_tokens=8), rig.add([1] * 11, max_tokens=8)
    rig.step()
    while not rig.scheduler.counters.num_preemptions:
        before = list(rig.told(young).token_ids)
        step = rig.step()
    assert [request.id for request in rig.scheduler.running] == [old]
    assert (shares(step), step.freed_rows) == ({0: 1}, [1])
    waiting = rig.scheduler.waiting[0]
    assert (waiting.id, waiting.num_computed, waiting.num_in_flight) == (young, 0, 0)
    new: list[NewRow] = []
    while not new:
        new = rig.step().new_rows
    assert new[0].token_ids == [1] * 11 + before
    assert len(before) == 2
    assert new[0].num_prompt_tokens == 11
    rig.run()
    assert rig.scheduler.counters.num_preemptions == 1


def test_no_request_is_admitted_in_a_step_that_preempts() -> None:
    rig = rig_of(num_blocks=8, max_model_len=28)
    rig.add(12, max_tokens=8)
    young = rig.add([1] * 12, max_tokens=8)
    rig.step()
    late = rig.add([2], max_tokens=1)
    step = rig.step()
    assert (step.new_rows, rig.scheduler.counters.num_preemptions) == ([], 1)
    assert [request.id for request in rig.scheduler.waiting] == [young, late]
    rig.run()


def test_with_priorities_the_least_important_is_preempted() -> None:
    rig = rig_of(num_blocks=8, max_model_len=28, limits={"by_priority": True})
    unimportant = rig.add(11, max_tokens=9, priority=5)
    important = rig.add([1] * 11, max_tokens=9, priority=1)
    while not rig.scheduler.counters.num_preemptions:
        rig.step()
    assert [request.id for request in rig.scheduler.running] == [important]
    assert rig.scheduler.waiting[0].id == unimportant
    rig.run()


def test_a_preempted_request_is_first_in_the_queue_again() -> None:
    rig = rig_of(num_blocks=8, max_model_len=28)
    rig.add(11, max_tokens=9)
    young = rig.add([1] * 11, max_tokens=9)
    rig.step()
    late = rig.add(26, max_tokens=1)
    while not rig.scheduler.counters.num_preemptions:
        rig.step()
    assert [request.id for request in rig.scheduler.waiting] == [young, late]
    rig.run()


def test_a_preempted_request_waits_for_its_steps_in_flight() -> None:
    rig = rig_of(num_blocks=8, max_model_len=28)
    old, young = rig.add(15, max_tokens=2), rig.add([1] * 11, max_tokens=9)
    for _ in range(2):
        rig.must_submit()
    step = rig.submit()  # the youngest needs a block that is not there
    assert step is None
    assert rig.scheduler.counters.num_preemptions == 1
    preempted = rig.scheduler.waiting[0]
    assert (preempted.id, preempted.num_in_flight) == (young, 2)
    assert rig.submit() is None
    rig.deliver()
    assert rig.submit() is None, "one token is still on its way"
    rig.deliver()
    assert (preempted.num_in_flight, len(preempted.output_token_ids)) == (0, 2)
    assert rig.told(old).ended
    step = rig.must_submit()
    assert len(step.new_rows[0].token_ids) == 13
    rig.run()


def test_a_preempted_request_may_end_before_it_is_back() -> None:
    rig = rig_of(num_blocks=8, max_model_len=28)
    old = rig.add(11, max_tokens=12)
    young = rig.add([1] * 11, max_tokens=2)
    rig.must_submit()
    rig.must_submit()  # both tokens of the youngest are on their way
    while not rig.scheduler.counters.num_preemptions:
        rig.must_submit()
    waiting = rig.scheduler.waiting[0]
    assert (waiting.id, waiting.num_in_flight) == (young, 2)
    rig.deliver()
    rig.deliver()
    assert rig.told(young).finish_reason == "length"
    assert [request.id for request in rig.scheduler.running] == [old]
    assert rig.scheduler.waiting == []
    rig.run()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_changes_no_token(depth: int, prefix_caching: bool) -> None:
    rig = rig_of(prefix_caching, num_blocks=17, max_tokens=7)
    for i in range(8):
        rig.add([i // 2] * (5 + i), max_tokens=20, n=1 + (i == 3), logprobs=1)
    rig.run(depth)
    assert rig.scheduler.counters.num_preemptions > 3
