"""A step in the making: what the scheduler decides, gathered into a StepInput."""

from array import array

from octavo.engine.block_manager import TableEdit
from octavo.engine.request import Request
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


class StepBuilder:
    """`budget` tokens are left to hand out.

    A step holds the steady requests (`decodes`) first, then others that compute one token, then those of more.
    """

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.new_rows: list[NewRow] = []
        self.forks: list[ForkRow] = []
        self.changes: list[TableChange] = []
        self.copies: list[BlockCopy] = []
        self.decodes: list[Request] = []
        self.children: list[Request] = []
        self.num_prompt_tokens = 0
        self._short: list[tuple[ScheduledRow, Request]] = []
        self._longer: list[tuple[ScheduledRow, Request]] = []
        self._samples: list[tuple[SampleRow, Request]] = []

    def decode(self, request: Request) -> None:
        """The request, which counts it as computed already, computes the token that it sampled last, and samples."""
        self.decodes.append(request)
        self.budget -= 1

    def add(self, row: ScheduledRow, request: Request) -> None:
        """The request computes `row` in this step."""
        (self._longer if row.num_tokens > 1 else self._short).append((row, request))
        self.budget -= row.num_tokens
        if row.start < request.num_prompt:
            self.num_prompt_tokens += min(row.num_tokens, request.num_prompt - row.start)

    def sample(self, request: Request, source: int, position: int) -> None:
        """The request samples its token of `position` from the last logits of row `source`."""
        self._samples.append((SampleRow(request.row, source, position), request))

    def edit(self, row: int, edits: list[TableEdit]) -> None:
        """The row's tables change before the step computes; shared blocks are copied."""
        for edit in edits:
            self.changes.append(TableChange(row, edit.group, edit.index, [edit.block]))
            if edit.copied_from is not None:
                self.copies.append(BlockCopy(edit.group, edit.copied_from, edit.block))

    def fork(self, parent: Request, child: Request, position: int, tables: list[list[int]]) -> None:
        """The child goes on from the parent's state and samples its token of `position`."""
        self.forks.append(ForkRow(parent.row, child.row, child.choice))
        self.changes += [TableChange(child.row, group, 0, list(table)) for group, table in enumerate(tables)]
        self.sample(child, parent.row, position)
        self.children.append(child)

    @property
    def requests(self) -> list[Request]:
        """The requests that compute, in the order of the step's rows, then those that only sample."""
        return self.decodes + [request for _, request in self._short + self._longer] + self.children

    @property
    def sampled(self) -> list[Request]:
        """The requests that sample, in the order of the step's samples."""
        return self.decodes + [request for _, request in self._samples]

    def build(self, freed_rows: list[int]) -> StepInput:
        """The finished step."""
        steady = array("i", [request.row for request in self.decodes])
        ends = array("i", [request.num_computed for request in self.decodes])
        samples = SampleRows(steady[:], steady[:], ends)
        rows = ScheduledRows(steady, array("i", [end - 1 for end in ends]), array("i", [1]) * len(steady))
        if self._short or self._longer or self._samples:
            rows.extend(row for row, _ in self._short + self._longer)
            samples.extend(sample for sample, _ in self._samples)
        return StepInput(
            self.step_id, freed_rows, self.new_rows, self.forks, self.changes, self.copies, [], rows, samples
        )
