"""A step in the making: what the scheduler decides, gathered into a StepInput."""

from octavo.engine.block_manager import TableEdit
from octavo.engine.request import Request
from octavo.engine.step import BlockCopy, ForkRow, NewRow, SampleRow, ScheduledRow, StepInput, TableChange


class StepBuilder:
    """`budget` tokens are left to hand out."""

    def __init__(self, step_id: int, budget: int) -> None:
        self.step_id = step_id
        self.budget = budget
        self.new_rows: list[NewRow] = []
        self.forks: list[ForkRow] = []
        self.changes: list[TableChange] = []
        self.copies: list[BlockCopy] = []
        self.decodes: list[ScheduledRow] = []
        self.longer: list[ScheduledRow] = []
        self.samples: list[SampleRow] = []
        self.requests: list[Request] = []
        self.children: list[Request] = []
        self.num_prompt_tokens = 0

    def add(self, row: ScheduledRow, request: Request) -> None:
        """The request computes `row` in this step."""
        (self.longer if row.num_tokens > 1 else self.decodes).append(row)
        self.requests.append(request)
        self.budget -= row.num_tokens
        if row.start < request.num_prompt:
            self.num_prompt_tokens += min(row.num_tokens, request.num_prompt - row.start)

    def decode(self, request: Request) -> None:
        """The request computes the token that it sampled last, and samples the next."""
        row, generation, start = request.row, request.generation, request.num_computed
        self.decodes.append(ScheduledRow(row, generation, start, 1))
        self.samples.append(SampleRow(row, generation, row, start + 1))
        self.requests.append(request)
        self.budget -= 1

    def edit(self, row: int, edits: list[TableEdit]) -> None:
        """The row's tables change before the step computes; shared blocks are copied."""
        for edit in edits:
            self.changes.append(TableChange(row, edit.group, edit.index, [edit.block]))
            if edit.copied_from is not None:
                self.copies.append(BlockCopy(edit.group, edit.copied_from, edit.block))

    def fork(self, parent: Request, child: Request, position: int, tables: list[list[int]]) -> None:
        """The child goes on from the parent's state and samples its token of `position`."""
        self.forks.append(ForkRow(parent.row, child.row, child.generation, child.choice))
        self.changes += [TableChange(child.row, group, 0, list(table)) for group, table in enumerate(tables)]
        self.samples.append(SampleRow(child.row, child.generation, parent.row, position))
        self.requests.append(child)
        self.children.append(child)

    def build(self, freed_rows: list[int]) -> StepInput:
        """The finished step."""
        # Rows of one token first, as attention backends expect; the order is kept otherwise.
        rows = self.decodes + self.longer
        return StepInput(
            self.step_id, freed_rows, self.new_rows, self.forks, self.changes, self.copies, [], rows, self.samples
        )
