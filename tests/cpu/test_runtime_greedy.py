"""Which steps may be sampled by the graph that takes each row's likeliest token."""

from typing import Any

import pytest
import torch
from octavo.batch import BatchShape
from octavo.engine.step import NewRow, SampleRow, SampleRows, ScheduledRow, ScheduledRows, StepInput
from octavo.runtime.rows import Row, RowTable
from octavo.runtime.runner import is_greedy
from octavo.sampling_params import SamplingParams

CPU = torch.device("cpu")
DECODES = BatchShape(4, 4, 1, 4)


def row_of(**params: Any) -> Row:
    new = NewRow(0, [1, 2], 2, [[1]], SamplingParams(**{"temperature": 0.0} | params), 0, 0)
    return Row.start(new, 50, frozenset({7}), CPU)


def greedy(
    shape: BatchShape | None = DECODES,
    sources: tuple[int, ...] = (0, 1),
    samples: tuple[int, ...] = (0, 1),
    **params: Any,
) -> bool:
    """Rows 0 and 1 decode; the second has `params`."""
    rows = RowTable(2)
    rows.put(0, row_of())
    rows.put(1, row_of(**params))
    step = StepInput(
        0,
        rows=ScheduledRows.of(ScheduledRow(0, 1, 1), ScheduledRow(1, 1, 1)),
        samples=SampleRows.of(*(SampleRow(row, source, 2) for row, source in zip(samples, sources, strict=True))),
    )
    return is_greedy(step, shape, rows)


def test_greedy_decodes_in_a_graph_are() -> None:
    assert greedy()


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"allowed_token_ids": (3,)},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.1},
        {"min_tokens": 2},
    ],
    ids=lambda params: next(iter(params)),
)
def test_one_row_that_asks_for_more_keeps_all_out(params: dict[str, Any]) -> None:
    assert not greedy(**params)


def test_a_step_without_a_graph_is_not() -> None:
    assert not greedy(shape=None)


def test_a_mixed_graph_is_not() -> None:
    assert not greedy(shape=BatchShape(64, 4, 64, 3))


@pytest.mark.parametrize(
    ("sources", "samples"), [((0,), (0,)), ((1, 0), (1, 0)), ((0, 0), (0, 1))], ids=["not all", "out of order", "fork"]
)
def test_each_row_must_sample_its_own_token(sources: tuple[int, ...], samples: tuple[int, ...]) -> None:
    assert not greedy(sources=sources, samples=samples)


def test_a_fork_stays_plain() -> None:
    from octavo.engine.step import ForkRow

    assert row_of().fork(ForkRow(0, 1, 1)).plain
    assert not row_of(logprobs=1).fork(ForkRow(0, 1, 1)).plain
