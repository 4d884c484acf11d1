"""The words between the scheduler and the executor: plain data, differences only.

A recorded sequence of StepInputs replays a run. A StepInput holds no sampled token: a decoding row's input is the token
that the device sampled for it last, which is what lets step n+1 be submitted before the output of step n is known.

What every request is part of in every step lies in columns, which cost a fraction of as many objects; what is made for
each row is not frozen, since that would double what it costs. Nobody changes either.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import msgspec

from octavo.sampling_params import SamplingParams

_ints = partial(array, "i")


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request takes a row: everything the device must know of it.

    `token_ids` are all tokens known so far: the prompt, and after a preemption the tokens generated before it, from
    which penalty counts are rebuilt. `blocks[g]` is the row's block table in KV group g.
    """

    row: int
    token_ids: list[int]
    num_prompt_tokens: int
    blocks: list[list[int]]
    params: SamplingParams
    seed: int
    choice: int


@dataclass(frozen=True, slots=True)
class ForkRow:
    """Row `row` becomes a copy of `source` (tokens, tables, penalty counts) with a choice number of its own."""

    source: int
    row: int
    choice: int


@dataclass(slots=True)
class TableChange:
    """Entries of a row's block table from `start` on in KV group `group` become `blocks`."""

    row: int
    group: int
    start: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy block `source` to `target` bytewise, in every layer of the group, before any write of the step."""

    group: int
    source: int
    target: int


class ScheduledRow(NamedTuple):
    """Row `row` computes `num_tokens` tokens from position `start`.

    Positions at or past the row's `token_ids` take the token that the device sampled for that position.
    """

    row: int
    start: int
    num_tokens: int


class SampleRow(NamedTuple):
    """Sample the token of `row` at `position` from the logits of the last token of `source`'s part of the batch."""

    row: int
    source: int
    position: int


R = TypeVar("R", bound=tuple[int, ...])


class _Columns(Generic[R]):
    """Rows of ints, a column for each field."""

    one: ClassVar[Callable[..., Any]]
    columns: ClassVar[Callable[..., "tuple[array[int], ...]"]]

    @classmethod
    def of(cls, *rows: R) -> Self:
        """Columns of these rows."""
        result = cls()
        result.extend(rows)
        return result

    def extend(self, rows: Iterable[R]) -> None:
        """These rows as well."""
        for column, values in zip(type(self).columns(self), zip(*rows, strict=True), strict=False):
            column.extend(values)

    def __len__(self) -> int:
        return len(type(self).columns(self)[0])

    def __getitem__(self, index: int) -> R:
        row: R = type(self).one(*(column[index] for column in type(self).columns(self)))
        return row

    def __iter__(self) -> Iterator[R]:
        return map(type(self).one, *type(self).columns(self))


@dataclass(slots=True)
class ScheduledRows(_Columns[ScheduledRow]):
    """The ScheduledRows of a step, in columns."""

    one = ScheduledRow
    columns = attrgetter(*ScheduledRow._fields)

    row: "array[int]" = field(default_factory=_ints)
    start: "array[int]" = field(default_factory=_ints)
    num_tokens: "array[int]" = field(default_factory=_ints)


@dataclass(slots=True)
class SampleRows(_Columns[SampleRow]):
    """The SampleRows of a step, in columns."""

    one = SampleRow
    columns = attrgetter(*SampleRow._fields)

    row: "array[int]" = field(default_factory=_ints)
    source: "array[int]" = field(default_factory=_ints)
    position: "array[int]" = field(default_factory=_ints)


@dataclass(frozen=True, slots=True)
class StepInput:
    """All that a step needs beyond what the device already has. Applied in the order of the fields.

    `rows` puts rows that compute one token first. `set_tokens` (row, token id) replaces the token that a row sampled
    last.
    """

    step_id: int
    freed_rows: list[int] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    forks: list[ForkRow] = field(default_factory=list)
    table_changes: list[TableChange] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    set_tokens: list[tuple[int, int]] = field(default_factory=list)
    rows: ScheduledRows = field(default_factory=ScheduledRows)
    samples: SampleRows = field(default_factory=SampleRows)

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.rows.num_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The sampled token's logprob and rank, and the `k` most likely tokens with theirs."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of the prompt tokens at positions `start`, `start` + 1, ... given the tokens before them.

    `index` is the place of their row among the step's.
    """

    index: int
    start: int
    logprobs: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave. `error` fails every request of the step.

    `token_ids` are those of the step's samples, in their order, and so are `logprobs`, which are none where nobody
    asked for any. `kv_counts` are the values that a KV cache in codes has clipped and all that it has written since it
    was made; not every step brings them.
    """

    step_id: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    error: str | None = None
    kv_counts: tuple[int, int] | None = None


class TokenEvent(msgspec.Struct):
    """News of one choice of a request, from the engine to whoever asked.

    `finish_reason` is None while the choice goes on. `num_cached_tokens` is told by choice 0.
    """

    request_id: str
    choice: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's counters and gauges at one moment; counters (num_preemptions and below) only grow."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    kv_usage: float = 0.0
    kv_tokens: int = 0
    kv_slots: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens_computed: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_copies: int = 0
    num_kv_clipped: int = 0
    num_kv_written: int = 0
