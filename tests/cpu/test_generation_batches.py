"""From StepInputs to batches: what a step's tensors hold, and what a fork in the middle of an answer takes over."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from octavo.batch import Batch, BatchShape
from octavo.engine.step import (
    BlockCopy,
    ForkRow,
    NewRow,
    SampleRow,
    SampleRows,
    ScheduledRow,
    ScheduledRows,
    StepInput,
    TableChange,
)
from octavo.runtime.buffers import BatchBuffers, Prepared
from octavo.runtime.rows import Row, RowTable
from octavo.runtime.runner import Runner
from octavo.sampling_params import SamplingParams
from tiny_models import GREEDY, Reference, start

CPU = torch.device("cpu")
BLOCK_SIZE = 8


def new_row(row: int, token_ids: list[int], blocks: list[list[int]], params: SamplingParams = GREEDY) -> NewRow:
    return NewRow(row, token_ids, len(token_ids), blocks, params, 0, 0)


def table_of(*new: NewRow) -> RowTable:
    rows = RowTable(4)
    for one in new:
        rows.put(one.row, Row.start(one, 100, frozenset(), CPU))
    return rows


def filled(buffers: BatchBuffers, step: StepInput, rows: RowTable, shape: BatchShape | None = None) -> Prepared:
    prepared = buffers.prepare(step, rows, shape)
    buffers.take_sampled(prepared)
    return prepared


@pytest.fixture
def batch() -> Batch:
    """Row 2 decodes at position 9; row 0 computes positions 6 to 9 of its ten tokens; two KV groups."""
    buffers = BatchBuffers(4, 32, 4, BLOCK_SIZE, 2, CPU)
    both = new_row(0, [*range(50, 60)], [[3, 4], [0, 7]]), new_row(2, [*range(70, 79)], [[5, 6], [8, 9]])
    rows = table_of(*both)
    for new in both:
        for group, blocks in enumerate(new.blocks):
            buffers.set_table(group, new.row, 0, blocks)
    buffers.last_token[2] = 99
    scheduled = ScheduledRows.of(ScheduledRow(2, 9, 1), ScheduledRow(0, 6, 4))
    samples = SampleRows.of(SampleRow(0, 0, 10), SampleRow(2, 2, 10), SampleRow(1, 0, 10))
    return filled(buffers, StepInput(0, rows=scheduled, samples=samples), rows).batch


def test_batch_holds_the_step(batch: Batch) -> None:
    assert batch.token_ids.tolist() == [99, 56, 57, 58, 59]
    assert batch.positions.tolist() == [9, 6, 7, 8, 9]
    assert batch.query_start.tolist() == batch.query_start_host == [0, 1, 5]
    assert batch.seq_lens.tolist() == batch.seq_lens_host == [10, 10]
    assert batch.row_index.tolist() == [2, 0]
    assert [table.tolist() for table in batch.block_tables] == [[[5, 6], [3, 4]], [[8, 9], [0, 7]]]
    assert [slots.tolist() for slots in batch.slots] == [[49, 30, 31, 32, 33], [73, 6, 7, 56, 57]]
    assert batch.sample_index.tolist() == [4, 0, 4]
    shape = batch.shape
    assert (shape.num_tokens, shape.num_requests, shape.max_query_len, shape.num_decodes) == (5, 2, 4, 1)


def test_the_tokens_that_are_sampled_are_a_batch_of_requests_of_one_token() -> None:
    buffers = BatchBuffers(4, 32, 4, BLOCK_SIZE, 1, CPU)
    rows = table_of(new_row(0, [*range(50, 60)], [[3, 4]]), new_row(2, [*range(70, 79)], [[5, 6]]))
    buffers.set_table(0, 0, 0, [3, 4])
    buffers.set_table(0, 1, 0, [3, 4])
    buffers.set_table(0, 2, 0, [5, 6])
    scheduled = ScheduledRows.of(ScheduledRow(2, 8, 1), ScheduledRow(0, 6, 4))
    step = StepInput(0, rows=scheduled, samples=SampleRows.of(SampleRow(0, 0, 10), SampleRow(1, 0, 10)))
    ends = buffers.ends(step, filled(buffers, step, rows).batch)
    assert (ends.token_ids.tolist(), ends.positions.tolist()) == ([59, 59], [9, 9])
    assert (ends.query_start.tolist(), ends.query_start_host) == ([0, 1, 2], [0, 1, 2])
    assert (ends.seq_lens.tolist(), ends.seq_lens_host) == ([10, 10], [10, 10])
    assert [table[:, :2].tolist() for table in ends.block_tables] == [[[3, 4], [3, 4]]]
    assert [slots.tolist() for slots in ends.slots] == [[33, 33]]
    assert ends.shape == BatchShape(2, 2, 1, 2)


def test_batch_has_the_dtypes_of_the_contract(batch: Batch) -> None:
    ints = (batch.token_ids, batch.positions, batch.query_start, batch.seq_lens, batch.row_index, batch.sample_index)
    assert {tensor.dtype for tensor in (*ints, *batch.block_tables)} == {torch.int32}
    assert {slots.dtype for slots in batch.slots} == {torch.int64}


@pytest.fixture
def runner(llama: Reference) -> Iterator[Runner]:
    engine = start(llama.path)
    executor: Any = engine._executor
    yield executor.runner
    engine.shutdown()


def test_fork_in_the_middle_goes_on_alike(llama: Reference, runner: Runner) -> None:
    """A row that decodes is forked, as beams are: both rows give the reference's tokens from there on."""
    prompt, tokens = llama.prompts[8], llama.tokens[8]
    length, row, fork = len(prompt), 0, 5

    def step(number: int, **changes: Any) -> list[int]:
        output = runner.sample(runner.submit(StepInput(number, **changes))).result()
        return output.token_ids

    def decode(rows: list[int], position: int) -> dict[str, Any]:
        return {
            "rows": ScheduledRows.of(*(ScheduledRow(one, position, 1) for one in rows)),
            "samples": SampleRows.of(*(SampleRow(one, one, position + 1) for one in rows)),
        }

    first = {
        "rows": ScheduledRows.of(ScheduledRow(row, 0, length)),
        "samples": SampleRows.of(SampleRow(row, row, length)),
    }
    assert step(0, new_rows=[new_row(row, prompt, [[1, 2, 3]])], **first) == tokens[:1]
    assert step(1, **decode([row], length)) == tokens[1:2]
    # The fork shares block 1 and gets a copy of block 2, which both go on to write.
    fork_changes = {
        "forks": [ForkRow(row, fork, 1)],
        "table_changes": [TableChange(fork, 0, 1, [4, 5])],
        "copies": [BlockCopy(0, 2, 4)],
    }
    assert step(2, **fork_changes, **decode([row, fork], length + 1)) == [tokens[2]] * 2
    for number in range(3, 12):
        assert step(number, **decode([row, fork], length + number - 1)) == [tokens[number]] * 2


def test_set_tokens_replaces_the_sampled_token(llama: Reference, runner: Runner) -> None:
    """What the host puts in a row's place is what the row goes on from."""
    prompt, tokens = llama.prompts[8], llama.tokens[8]
    length = len(prompt)
    new, rows = new_row(0, prompt[:-1], [[1, 2, 3]]), ScheduledRows.of(ScheduledRow(0, 0, length - 1))
    runner.sample(runner.submit(StepInput(0, new_rows=[new], rows=rows)))
    rows, samples = ScheduledRows.of(ScheduledRow(0, length - 1, 1)), SampleRows.of(SampleRow(0, 0, length))
    step = StepInput(1, set_tokens=[(0, prompt[-1])], rows=rows, samples=samples)
    output = runner.sample(runner.submit(step)).result()
    assert output.token_ids == tokens[:1]


@pytest.mark.parametrize(("params", "number"), [(GREEDY, 1), (SamplingParams(prompt_logprobs=1), 9)])
def test_the_end_of_the_model_computes_what_is_asked_for(
    llama: Reference, runner: Runner, params: SamplingParams, number: int
) -> None:
    prompt = llama.prompts[8][:9]
    new, rows = new_row(0, prompt, [[1, 2]], params), ScheduledRows.of(ScheduledRow(0, 0, 9))
    computed = runner.submit(StepInput(0, new_rows=[new], rows=rows, samples=SampleRows.of(SampleRow(0, 0, 9))))
    assert len(computed.hidden) == number


def test_a_padded_batch_holds_the_same_and_padding_behind() -> None:
    buffers = BatchBuffers(4, 32, 4, BLOCK_SIZE, 1, CPU)
    new = new_row(1, [*range(50, 60)], [[3, 4]])
    rows = table_of(new)
    buffers.set_table(0, 1, 0, [3, 4])
    step = StepInput(0, rows=ScheduledRows.of(ScheduledRow(1, 6, 4)), samples=SampleRows.of(SampleRow(1, 1, 10)))
    plain = filled(buffers, step, rows).batch.token_ids.tolist()
    padded = filled(buffers, step, rows, BatchShape(8, 3, 8, 2)).batch
    assert padded.shape == BatchShape(8, 3, 8, 2)
    assert padded.token_ids.tolist() == [*range(56, 60), 0, 0, 0, 0] == [*plain, 0, 0, 0, 0]
    assert padded.slots[0].tolist() == [30, 31, 32, 33, -1, -1, -1, -1]
    assert padded.query_start.tolist() == [0, 4, 4, 4], "padding repeats the last start"
    assert padded.seq_lens.tolist() == [10, 0, 0]
    assert padded.block_tables[0].tolist() == [[3, 4], [0, 0], [0, 0]], "padding's blocks are the null block"
    assert padded.sample_index.tolist() == [3]


def test_padding_of_a_batch_of_decodes_has_a_token_each() -> None:
    buffers = BatchBuffers(4, 32, 4, BLOCK_SIZE, 1, CPU)
    rows = table_of(new_row(2, [5], [[3]]))
    buffers.set_table(0, 2, 0, [3])
    buffers.last_token[2] = 77
    step = StepInput(0, rows=ScheduledRows.of(ScheduledRow(2, 1, 1)), samples=SampleRows.of(SampleRow(2, 2, 2)))
    batch = filled(buffers, step, rows, BatchShape(4, 4, 1, 4)).batch
    assert batch.query_start.tolist() == [0, 1, 2, 3, 4]
    assert batch.seq_lens.tolist() == [2, 0, 0, 0]
    assert batch.token_ids.tolist() == [77, 0, 0, 0]
    assert batch.slots[0].tolist() == [25, -1, -1, -1]


def test_a_request_of_one_known_token_is_no_other_than_those_whose_token_the_device_has() -> None:
    buffers = BatchBuffers(4, 32, 4, BLOCK_SIZE, 1, CPU)
    rows = table_of(*(new_row(row, [*range(50, 60)], [[3, 4]]) for row in (1, 2)))
    buffers.set_table(0, 1, 0, [3, 4])
    buffers.set_table(0, 2, 0, [5, 6])
    buffers.last_token[:] = torch.tensor([90, 91, 92, 93, 94])
    step = StepInput(
        0,
        rows=ScheduledRows.of(ScheduledRow(2, 10, 1), ScheduledRow(1, 9, 1)),
        samples=SampleRows.of(SampleRow(2, 2, 11), SampleRow(1, 1, 10)),
    )
    for shape in (None, BatchShape(4, 4, 1, 4), BatchShape(8, 3, 8, 2)):
        prepared = filled(buffers, step, rows, shape)
        batch, padding = prepared.batch, [0] * ((shape.num_tokens if shape else 2) - 2)
        assert batch.token_ids.tolist() == [92, 59, *padding]
        assert batch.positions.tolist() == [10, 9, *padding]
        assert batch.slots[0].tolist() == [50, 33, *[-1 for _ in padding]]
        assert batch.sample_index.tolist() == [0, 1]
        assert prepared.sample_rows.tolist() == [2, 1]


def test_batches_of_a_shape_lie_at_the_same_addresses() -> None:
    buffers = BatchBuffers(4, 32, 4, BLOCK_SIZE, 2, CPU)
    shape = BatchShape(8, 3, 8, 2)
    padding = buffers.padding(shape)
    empty = padding.batch
    new = new_row(1, [*range(50, 60)], [[3, 4], [5, 6]])
    for group, blocks in enumerate(new.blocks):
        buffers.set_table(group, 1, 0, blocks)
    rows = table_of(new)
    step = StepInput(0, rows=ScheduledRows.of(ScheduledRow(1, 6, 4)), samples=SampleRows.of(SampleRow(1, 1, 10)))
    prepared = buffers.prepare(step, rows, shape)
    full = prepared.batch
    names = ("token_ids", "positions", "query_start", "seq_lens", "row_index")
    assert [getattr(empty, n).data_ptr() for n in names] == [getattr(full, n).data_ptr() for n in names]
    assert [x.data_ptr() for x in empty.slots] == [x.data_ptr() for x in full.slots]
    assert padding.targets.data_ptr() == prepared.targets.data_ptr()
    assert empty.seq_lens_host == [0, 0, 0] and empty.query_start_host == [0, 0, 0, 0]
