"""Which steps may be sampled by the graph that takes each row's likeliest token."""

from typing import Any

import pytest
import torch
from octavo.batch import BatchShape
from octavo.engine.step import NewRow, SampleRow, ScheduledRow, StepInput
from octavo.runtime.buffers import BatchBuffers
from octavo.runtime.rows import Row
from octavo.runtime.runner import Computed
from octavo.sampling_params import SamplingParams

CPU = torch.device("cpu")
DECODES = BatchShape(4, 4, 1, 4)


def row_of(**params: Any) -> Row:
    new = NewRow(0, 0, [1, 2], 2, [[1]], SamplingParams(**{"temperature": 0.0} | params), 0, 0)
    return Row.start(new, 50, frozenset({7}), CPU)


def computed(
    shape: BatchShape | None = DECODES,
    sources: tuple[int, ...] = (0, 1),
    samples: tuple[int, ...] = (0, 1),
    **params: Any,
) -> Computed:
    """Rows 0 and 1 decode; the second has `params`."""
    rows = {0: row_of(), 1: row_of(**params)}
    step = StepInput(
        0,
        rows=[ScheduledRow(0, 0, 1, 1), ScheduledRow(1, 0, 1, 1)],
        samples=[SampleRow(row, 0, source, 2) for row, source in zip(samples, sources, strict=True)],
    )
    prepared = BatchBuffers(4, 8, 2, 8, 1, CPU).prepare(step, rows)
    return Computed(step, prepared, torch.zeros(2, 8), rows, shape, False)


def test_greedy_decodes_in_a_graph_are() -> None:
    assert computed().is_greedy


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
    assert not computed(**params).is_greedy


def test_a_step_without_a_graph_is_not() -> None:
    assert not computed(shape=None).is_greedy


def test_a_mixed_graph_is_not() -> None:
    assert not computed(shape=BatchShape(64, 4, 64, 3)).is_greedy


@pytest.mark.parametrize(
    ("sources", "samples"), [((0,), (0,)), ((1, 0), (1, 0)), ((0, 0), (0, 1))], ids=["not all", "out of order", "fork"]
)
def test_each_row_must_sample_its_own_token(sources: tuple[int, ...], samples: tuple[int, ...]) -> None:
    assert not computed(sources=sources, samples=samples).is_greedy


def test_a_fork_stays_plain() -> None:
    from octavo.engine.step import ForkRow

    assert row_of().fork(ForkRow(0, 1, 0, 1)).plain
    assert not row_of(logprobs=1).fork(ForkRow(0, 1, 0, 1)).plain
