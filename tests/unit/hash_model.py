"""An executor that really computes the model of hashes through block tables.

A lost, stale, overwritten, uncopied or wrongly trimmed block therefore changes all tokens that follow.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from hash_oracle import first_seen, mix, pick, told_logprob
from octavo.config import EngineConfig
from octavo.engine.executor import Capacity
from octavo.engine.step import (
    ForkRow,
    NewRow,
    PromptLogprobs,
    ScheduledRow,
    StepInput,
    StepOutput,
    TokenLogprob,
)
from octavo.plugins.registry import Plugins
from octavo.sampling_params import SamplingParams, choice_seed


@dataclass
class DeviceRow:
    """A row on the device. `token_ids` are the known ones, then those that the device sampled."""

    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    request_seed: int
    seed: int
    tables: list[list[int]]
    num_computed: int = 0
    generated: list[int] = field(default_factory=list)
    lost: bool = False


@dataclass
class Handle:
    """A computed step: the state of each row's last token, and all states of rows that want prompt logprobs."""

    step: StepInput
    states: dict[int, int]
    prompt_logprobs: list[PromptLogprobs]


class LazyFuture(Future[StepOutput]):
    """Withholds its result until someone asks for it."""

    def __init__(self, resolve: Callable[[], StepOutput]) -> None:
        super().__init__()
        self._resolve = resolve

    def result(self, timeout: float | None = None) -> StepOutput:
        """The output, made known now."""
        if not self.done():
            self.set_result(self._resolve())
        return super().result(timeout)


class HashExecutor:
    """Computes in the order of submission; everything odd about a step goes into `violations`.

    `fail_next` is "submit" (the next step is refused before it changes anything; none may follow until that is known),
    "sample" (it computes nonsense and gives an error, and its rows hold nonsense from then on) or None. `free_blocks`
    names blocks whose content must not matter any more: they are overwritten before each step.
    """

    def __init__(self, capacity: Capacity, *, lazy: bool = False) -> None:
        self.capacity = capacity
        self.lazy = lazy
        self.fail_next: str | None = None
        self.free_blocks: Callable[[], Iterable[int]] = lambda: ()
        self.rows: dict[int, DeviceRow] = {}
        self.steps: list[StepInput] = []
        self.log: list[tuple[str, int]] = []
        self.violations: list[str] = []
        self.failed_steps: set[int] = set()
        self.unwell: str | None = None
        self.running = False
        self._num_poisoned = 0
        size = capacity.num_blocks * capacity.block_size
        self._cells = [[self._poison() for _ in range(size)] for _ in range(2)]

    # -- the executor's interface ------------------------------------------------------------------------

    def start(self, config: EngineConfig, plugins: Plugins, progress: Callable[[str], None]) -> Capacity:
        self.running = True
        return self.capacity

    def submit(self, step: StepInput) -> Handle:
        fails, self.fail_next = self.fail_next, None
        self._require(step.step_id == len(self.steps), f"step {step.step_id} after {len(self.steps)} steps")
        self.steps.append(step)
        self.log.append(("submit", step.step_id))
        if fails:
            self.failed_steps.add(step.step_id)
        if fails == "submit":
            self._lose(step)
            raise RuntimeError(f"step {step.step_id} is refused")
        self._poison_free_blocks()
        self._apply(step)
        if fails:
            self._lose(step)
        self._check(step)
        return self._forward(step)

    def sample(self, handle: object, masks: object | None = None) -> Future[StepOutput]:
        assert isinstance(handle, Handle)
        output = self._sample(handle)

        def resolve() -> StepOutput:
            self.log.append(("resolve", output.step_id))
            return output

        if self.lazy:
            return LazyFuture(resolve)
        future: Future[StepOutput] = Future()
        future.set_result(resolve())
        return future

    def health(self) -> str | None:
        return self.unwell

    def shutdown(self) -> None:
        self.running = False

    # -- state -------------------------------------------------------------------------------------------

    def _require(self, fine: bool, otherwise: str) -> None:
        if not fine:
            self.violations.append(f"step {len(self.steps)}: {otherwise}")

    def _poison(self) -> int:
        self._num_poisoned += 1
        return mix(0xDEAD, self._num_poisoned)

    def _poison_block(self, block: int) -> None:
        size = self.capacity.block_size
        for cells in self._cells:
            cells[block * size : (block + 1) * size] = [self._poison() for _ in range(size)]

    def _poison_free_blocks(self) -> None:
        for block in self.free_blocks():
            self._poison_block(block)

    def _lose(self, step: StepInput) -> None:
        """The step fails: from now on its rows hold nonsense."""
        for row in (*step.rows.row, *step.samples.row):
            if row in self.rows:
                self.rows[row].lost = True

    def _apply(self, step: StepInput) -> None:
        for freed in step.freed_rows:
            self.rows.pop(freed, None)
        for new in step.new_rows:
            self._take(new)
        for fork in step.forks:
            self._fork(fork)
        for change in step.table_changes:
            if change.row not in self.rows:  # a row that gave up while the step was made
                self._require(change.row in step.freed_rows, f"{change} of an unknown row")
            else:
                end = change.start + len(change.blocks)
                table = self.rows[change.row].tables[change.group]
                self._require(change.start <= len(table), f"a gap in the table of row {change.row}")
                table[change.start : end] = change.blocks
        self._copy(step)
        for index, token in step.set_tokens:
            self.rows[index].token_ids[-1] = token

    def _take(self, new: NewRow) -> None:
        self.rows[new.row] = DeviceRow(
            list(new.token_ids),
            new.num_prompt_tokens,
            new.params,
            new.seed,
            choice_seed(new.seed, new.choice),
            [list(blocks) for blocks in new.blocks],
            -1,
            new.token_ids[new.num_prompt_tokens :],
        )

    def _fork(self, fork: ForkRow) -> None:
        source = self.rows[fork.source]
        self.rows[fork.row] = replace(
            source,
            seed=choice_seed(source.request_seed, fork.choice),
            token_ids=list(source.token_ids),
            generated=list(source.generated),
            tables=[list(table) for table in source.tables],
        )

    def _copy(self, step: StepInput) -> None:
        targets = [copy.target for copy in step.copies]
        sources = {copy.source for copy in step.copies}
        self._require(len(set(targets)) == len(targets), "two copies into one block")
        self._require(sources.isdisjoint(targets), "a copy of a copy")
        size = self.capacity.block_size
        for copy in step.copies:
            for cells in self._cells:
                source = cells[copy.source * size : (copy.source + 1) * size]
                cells[copy.target * size : (copy.target + 1) * size] = source

    # -- checks ------------------------------------------------------------------------------------------

    def _check(self, step: StepInput) -> None:
        counts = [row.num_tokens for row in step.rows]
        self._require(bool(counts) and min(counts) >= 1, "an empty row or step")
        self._require(sum(counts) <= self.capacity.max_tokens, f"{sum(counts)} tokens in a step")
        self._require(len({row.row for row in step.rows}) == len(counts), "a row twice")
        self._require(len(self.rows) <= self.capacity.max_requests, f"{len(self.rows)} rows")
        decodes = [count == 1 for count in counts]
        self._require(decodes == sorted(decodes, reverse=True), "a row of several tokens before one of one token")
        ends = {row.row: row.start + row.num_tokens for row in step.rows}
        for row in step.rows:
            if not self.rows[row.row].lost:
                self._check_row(row)
        for sample in step.samples:
            self._require(ends.get(sample.source) == sample.position, f"{sample} does not follow its source")

    def _check_row(self, row: ScheduledRow) -> None:
        device = self.rows[row.row]
        self._require(device.num_computed in (-1, row.start), f"{row}, but {device.num_computed} are computed")
        self._require(row.start + row.num_tokens <= len(device.token_ids), f"{row} of tokens that nobody knows")
        limit = self.capacity.max_model_len
        self._require(row.start + row.num_tokens <= limit, f"{row} is past the model's length")

    # -- the model ---------------------------------------------------------------------------------------

    def _forward(self, step: StepInput) -> Handle:
        """Every layer writes the cells of the whole batch before any row reads them.

        But a row of one token reads the cells before its own as they were before the step (contract C2).
        """
        values = {row.row: self._inputs(row) for row in step.rows}
        for layer in range(2):
            before = list(self._cells[layer])
            for row in step.rows:
                self._write(layer, row, values[row.row])
            values = {row.row: self._read(layer, row, values[row.row], before) for row in step.rows}
        for row in step.rows:
            self.rows[row.row].num_computed = row.start + row.num_tokens
        for sample in step.samples:  # a fork is as far as its source
            self.rows[sample.row].num_computed = sample.position
        states = {row.row: values[row.row][-1] for row in step.rows}
        told = [self._prompt_logprobs(index, row, values[row.row]) for index, row in enumerate(step.rows)]
        return Handle(step, states, [one for part in told for one in part])

    def _inputs(self, row: ScheduledRow) -> list[int]:
        if self.rows[row.row].lost:
            return [self._poison() for _ in range(row.num_tokens)]
        return self.rows[row.row].token_ids[row.start : row.start + row.num_tokens]

    def _slots(self, row: ScheduledRow, group: int, first: int, end: int) -> list[int]:
        size, table = self.capacity.block_size, self.rows[row.row].tables[group]
        self._require(end <= len(table) * size, f"{row} reaches past its table")
        return [table[j // size] * size + j % size for j in range(first, end) if j // size < len(table)]

    def _write(self, layer: int, row: ScheduledRow, values: list[int]) -> None:
        for group in range(len(self.capacity.groups)):
            slots = self._slots(row, group, row.start, row.start + row.num_tokens)
            for position, (slot, value) in enumerate(zip(slots, values, strict=False), row.start):
                self._require(slot >= self.capacity.block_size, f"{row} writes into the null block")
                self._cells[layer][slot] = mix(layer, group, value, position)

    def _read(self, layer: int, row: ScheduledRow, values: list[int], before: list[int]) -> list[int]:
        cells, end = self._cells[layer], row.start + row.num_tokens
        earlier = before if row.num_tokens == 1 else cells
        begins = [first_seen(group, row.start) for group in self.capacity.groups]
        seen = [
            [earlier[slot] for slot in self._slots(row, g, begin, row.start)]
            + [cells[slot] for slot in self._slots(row, g, row.start, end)]
            for g, begin in enumerate(begins)
        ]
        states: list[int] = []
        for position, value in enumerate(values, row.start):
            sums = [
                sum(of_group[first_seen(group, position) - begin : position + 1 - begin])
                for group, begin, of_group in zip(self.capacity.groups, begins, seen, strict=True)
            ]
            states.append(mix(value, position, *sums) if layer == 0 else mix(value, *sums))
        return states

    def _prompt_logprobs(self, index: int, row: ScheduledRow, states: list[int]) -> list[PromptLogprobs]:
        device = self.rows[row.row]
        end = min(row.start + row.num_tokens, device.num_prompt - 1)
        if device.params.prompt_logprobs is None or end <= row.start:
            return []
        targets = device.token_ids[row.start + 1 : end + 1]
        told = [told_logprob(state, token) for state, token in zip(states, targets, strict=False)]
        return [PromptLogprobs(index, row.start + 1, told)]

    def _sample(self, handle: Handle) -> StepOutput:
        step = handle.step
        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for sample in step.samples:
            row = self.rows[sample.row]
            state = self._poison() if row.lost else handle.states[sample.source]
            token = pick(state, row.seed, sample.position, row.params, row.generated)
            row.token_ids.append(token)
            row.generated = [*row.generated, token]
            tokens.append(token)
            logprobs.append(None if row.params.logprobs is None else told_logprob(state, token))
        if step.step_id in self.failed_steps:
            return StepOutput(step.step_id, error=f"step {step.step_id} failed")
        asked = any(logprob is not None for logprob in logprobs)
        return StepOutput(step.step_id, tokens, logprobs if asked else [], handle.prompt_logprobs)
