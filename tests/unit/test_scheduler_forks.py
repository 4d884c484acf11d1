"""Choices that fork at the end of the prompt, windows in the scheduler, and its gauges."""

import pytest
from engine_helpers import Rig, capacity_of, rig_of, shares
from octavo.engine.block_manager import KVGroup
from octavo.engine.step import ForkRow, SampleRow, SampleRows, ScheduledRow, ScheduledRows, TableChange

# -- forks -----------------------------------------------------------------------------------------------


def test_choices_fork_at_the_end_of_the_prompt_and_sample_from_its_row() -> None:
    rig = rig_of(num_blocks=20, max_tokens=6)
    rig.add(9, n=3, max_tokens=3)
    step = rig.step()
    assert (step.forks, len(step.samples), len(step.new_rows)) == ([], 0, 1)
    assert rig.scheduler._rows.num_free == 8 - 3
    step = rig.step()
    assert step.forks == [ForkRow(0, 1, 1), ForkRow(0, 2, 2)]
    assert step.rows == ScheduledRows.of(ScheduledRow(0, 6, 3))
    assert step.samples == SampleRows.of(SampleRow(1, 0, 9), SampleRow(2, 0, 9), SampleRow(0, 0, 9))
    assert step.table_changes == [
        TableChange(1, 0, 0, [1, 2, 3]),
        TableChange(2, 0, 0, [1, 2, 3]),
        TableChange(0, 0, 2, [3]),
    ]
    step = rig.step()
    assert shares(step) == {0: 1, 1: 1, 2: 1}
    assert [(copy.group, copy.source) for copy in step.copies] == [(0, 3), (0, 3)]
    assert rig.scheduler.snapshot().num_copies == 2
    rig.run()
    assert len({tuple(rig.told("request-0", choice).token_ids) for choice in range(3)}) == 3


def test_copy_on_write_counts() -> None:
    rig = Rig(capacity_of(num_blocks=80, block_size=16, max_model_len=600, max_tokens=1024), prefix_caching=False)
    name = rig.add([3] * 505, n=8, max_tokens=5, seed=77)
    rig.step()
    assert rig.scheduler.snapshot().num_prompt_tokens_computed == 505
    assert rig.blocks.pool.num_used == 32
    rig.step()
    stats = rig.scheduler.snapshot()
    assert (stats.num_blocks_used, stats.num_copies, stats.num_prompt_tokens_computed) == (31 + 8, 7, 505)
    rig.run()
    assert rig.scheduler.snapshot().num_copies == 7
    assert len({tuple(rig.told(name, choice).token_ids) for choice in range(8)}) == 8


def test_every_choice_is_preempted_and_recomputed_on_its_own() -> None:
    rig = rig_of(num_blocks=8, max_model_len=28)
    rig.add(9, n=4, max_tokens=16)
    rig.run(2)
    assert rig.scheduler.counters.num_preemptions >= 3


def test_a_request_that_is_preempted_before_it_forks_takes_all_its_rows_again() -> None:
    rig = rig_of(num_blocks=9, max_model_len=32, max_tokens=9)
    rig.add(13, max_tokens=16)
    rig.step()
    rig.add([1] * 17, n=3, max_tokens=3)
    while not rig.scheduler.counters.num_preemptions:
        rig.step()
    waiting = rig.scheduler.waiting[0]
    assert (waiting.choices, waiting.spare_rows) == (3, [])
    assert rig.scheduler._rows.num_free == 7
    rig.run()


# -- windows ---------------------------------------------------------------------------------------------


def test_blocks_behind_the_window_are_freed_while_the_request_runs() -> None:
    rig = rig_of(num_blocks=33, groups=(KVGroup(), KVGroup(6)))
    rig.add(16, max_tokens=30)
    rig.step()
    assert rig.blocks.pool.num_used == 8
    assert rig.step().table_changes[:2] == [TableChange(0, 1, 0, [0]), TableChange(0, 1, 1, [0])]
    assert [len([b for b in table if b]) for table in rig.blocks.tables(1)] == [5, 3]
    rig.run()


@pytest.mark.parametrize("groups", [(KVGroup(6),), (KVGroup(), KVGroup(5)), (KVGroup(3), KVGroup(9), KVGroup())])
def test_windows_change_no_token_of_what_they_show(groups: tuple[KVGroup, ...]) -> None:
    rig = rig_of(True, num_blocks=60, groups=groups, max_tokens=9)
    for i in range(6):
        rig.add([7] * (8 + 4 * (i % 3)) + [i // 3], max_tokens=14, n=1 + i % 2, prompt_logprobs=1 if i == 4 else None)
    rig.run(2)
    assert rig.scheduler.counters.num_cached_tokens > 0


# -- gauges ----------------------------------------------------------------------------------------------


def test_the_snapshot_counts_what_is_held() -> None:
    rig = rig_of(num_blocks=21, max_requests=2)
    for _ in range(3):
        rig.add(5, max_tokens=3)
    rig.step()
    stats = rig.scheduler.snapshot()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_blocks, stats.num_blocks_used, stats.kv_usage) == (20, 4, 0.2)
    assert (stats.kv_slots, stats.kv_tokens) == (16, 10)
    assert (stats.num_prompt_tokens, stats.num_prompt_tokens_computed, stats.num_generated_tokens) == (15, 10, 2)
    assert stats.num_steps == 1
    rig.run()
