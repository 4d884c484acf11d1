"""Continuous batching: which tokens of which requests the next step computes.

There is no prefill and no decode phase (Yu et al. 2022, Orca; Agrawal et al. 2024, Sarathi-Serve, chunked prefill): a
request has tokens computed and tokens wanted, and each step hands out a token budget, running requests first.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count, repeat

from octavo.engine.block_manager import BlockManager, TableEdit
from octavo.engine.request import Request, Status
from octavo.engine.rows import Rows
from octavo.engine.step import (
    EngineStats,
    NewRow,
    PromptLogprobs,
    ScheduledRow,
    StepInput,
    StepOutput,
    TokenEvent,
    TokenLogprob,
)
from octavo.engine.step_builder import StepBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What a step and the engine may hold. `max_tokens_per_prompt` 0 means no limit of its own."""

    max_requests: int
    max_tokens: int
    max_tokens_per_prompt: int = 0
    chunked_prefill: bool = True
    by_priority: bool = False


@dataclass(slots=True)
class Counters:
    """What has happened since the engine started; the words are EngineStats's."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens_computed: int = 0
    num_generated_tokens: int = 0
    num_steps: int = 0
    num_copies: int = 0
    num_kv_clipped: int = 0
    num_kv_written: int = 0


@dataclass(slots=True)
class _InFlight:
    """A submitted step, its requests in the order of its rows, and those of its samples.

    None stands for a request that a failed step made begin anew since: what the step gives it is void.
    """

    step_id: int
    requests: Sequence[Request | None]
    sampled: Sequence[Request | None]

    def forget(self, lost: list[Request]) -> None:
        """What the step gives these requests is void."""
        self.requests = [None if request in lost else request for request in self.requests]
        self.sampled = [None if request in lost else request for request in self.sampled]


class Scheduler:
    """Requests in, StepInputs out; StepOutputs in, events out.

    `schedule` may be called again before the output of the last step is known. It is remembered whose rows and samples
    a step holds, and what it gives to a request that has ended meanwhile is dropped.
    """

    def __init__(
        self, limits: SchedulerLimits, blocks: BlockManager, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.eos_token_ids = eos_token_ids
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counters = Counters()
        self.started: list[str] = []
        self._rows = Rows(limits.max_requests)
        self._in_flight: deque[_InFlight] = deque()
        self._events: list[TokenEvent] = []
        self._step_id = 0
        self._keys = count(1)

    # -- requests in and out ----------------------------------------------------------------------------------------

    def new_key(self) -> int:
        """A key that no request has had."""
        return next(self._keys)

    def add(self, request: Request) -> None:
        """Queue a request, behind its equals."""
        request.arrival = request.key
        eos = frozenset[int]() if request.params.ignore_eos else self.eos_token_ids
        request.stops = eos.union(request.params.stop_token_ids) if request.params.stop_token_ids else eos
        self._enqueue(request)
        self.counters.num_prompt_tokens += request.num_prompt

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it, without an event. Unknown ids are ignored."""
        for request in [*self.running, *self.waiting]:
            if request.id == request_id and choice in (None, request.choice):
                self._finish(request)

    @property
    def has_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.running or self.waiting)

    def _enqueue(self, request: Request) -> None:
        request.status = Status.WAITING
        insort(self.waiting, request, key=self._order)

    def _order(self, request: Request) -> tuple[int, int, int]:
        return (request.priority if self.limits.by_priority else 0, request.arrival, request.choice)

    # -- schedule ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepInput | None:
        """The next step, or None when nothing can be computed now."""
        step = StepBuilder(self._step_id, self.limits.max_tokens)
        preempted = self._schedule_running(step)
        if not preempted:
            self._schedule_waiting(step)
        if step.budget == self.limits.max_tokens:
            return None
        for child in step.children:
            insort(self.running, child, key=self._order)
        self._step_id += 1
        self._in_flight.append(_InFlight(step.step_id, step.requests, step.sampled))
        self.counters.num_steps += 1
        self.counters.num_copies += len(step.copies)
        self.counters.num_prompt_tokens_computed += step.num_prompt_tokens
        return step.build(self._rows.drain_freed())

    def _schedule_running(self, step: StepBuilder) -> bool:
        preempted, index = False, 0
        while index < len(self.running) and step.budget:
            request = self.running[index]
            if request.num_computed < request.steady_end:
                self._decode(step, request)
                index += 1
                continue
            num_tokens = self._share(request, step)
            if num_tokens == 0:
                index += 1
                continue
            self.blocks.advance(request.key, request.num_computed)
            step.edit(request.row, self.blocks.trim(request.key))
            edits = self.blocks.grow(request.key, request.num_computed + num_tokens)
            if edits is None:
                self._preempt(max(self.running, key=self._order))  # the youngest
                preempted = True
                continue
            self._compute(step, request, num_tokens, edits)
            index += 1
        return preempted

    def _decode(self, step: StepBuilder, request: Request) -> None:
        """Book a steady request. The short way of most requests in most steps: `_compute` comes to the same."""
        request.num_computed += 1
        request.num_in_flight += 1
        request.last_step = step.step_id
        step.decode(request)
        if request.num_computed == request.steady_end:
            self._publish(request)

    def _share(self, request: Request, step: StepBuilder) -> int:
        """How many tokens the request computes in this step."""
        wanted = request.num_wanted
        wanted = min(wanted, self.limits.max_tokens_per_prompt or wanted)
        if wanted > step.budget and not self.limits.chunked_prefill:
            return 0
        return min(wanted, step.budget)

    def _schedule_waiting(self, step: StepBuilder) -> None:
        while self.waiting and step.budget:
            request = self.waiting[0]
            if request.num_in_flight or self._rows.num_free < request.choices or not self._admit(step, request):
                return

    def _admit(self, step: StepBuilder, request: Request) -> bool:
        """Start a waiting request; False, with nothing changed, if it does not fit."""
        hits = self._prefix_hits(request, step.step_id)
        request.num_computed = self.blocks.admit(request.key, hits)
        num_tokens = self._share(request, step)
        # What is before a single token is written before the step's plan (contract C2), so not by the step itself.
        fits = num_tokens > 1 or (num_tokens == 1 and not self.blocks.fills(step.step_id, hits))
        edits = self.blocks.grow(request.key, request.num_computed + num_tokens) if fits else None
        if edits is None:
            self.blocks.free(request.key)
            request.num_computed = 0
            return False
        self.waiting.pop(0)
        self._start(step, request, len(hits))
        self._compute(step, request, num_tokens, [])
        return True

    def _prefix_hits(self, request: Request, step_id: int) -> list[bytes]:
        """Hashes of the cached blocks to begin with; one token is left to compute, two where the step fills a block."""
        if not self.blocks.prefix_caching or request.params.prompt_logprobs is not None:
            return []
        request.extend_hashes(self.blocks.block_size)
        usable = request.hashes[: (request.num_known - 1) // self.blocks.block_size]
        hits = usable[: self.blocks.match(usable)]
        if len(hits) * self.blocks.block_size + 1 == request.num_known and self.blocks.fills(step_id, hits):
            hits = hits[: self.blocks.match(hits[:-1])]
        return hits

    def _start(self, step: StepBuilder, request: Request, num_hits: int) -> None:
        rows = [self._rows.take() for _ in range(request.choices)]
        request.row, request.spare_rows = rows[0], rows[1:]
        request.status = Status.RUNNING
        request.num_published = num_hits
        request.shared_step = step.step_id if num_hits else -1
        if request.num_cached is None:
            request.num_cached = min(request.num_computed, request.num_prompt)
            self.counters.num_cached_tokens += request.num_cached
            self.started.append(request.id)
        insort(self.running, request, key=self._order)
        step.new_rows.append(
            NewRow(
                request.row,
                request.known_token_ids(),
                request.num_prompt,
                [list(table) for table in self.blocks.tables(request.key)],
                request.params,
                request.seed,
                request.choice,
            )
        )

    def _compute(self, step: StepBuilder, request: Request, num_tokens: int, edits: list[TableEdit]) -> None:
        """Book `num_tokens` of the request, whose blocks are there, into the step."""
        step.add(ScheduledRow(request.row, request.num_computed, num_tokens), request)
        request.num_computed += num_tokens
        request.last_step = step.step_id
        self._publish(request)
        if request.num_computed == request.num_tokens:
            self._sample(step, request)
            if not request.sync:
                request.steady_end = min(self.blocks.room(request.key), request.last_computed)
        step.edit(request.row, edits)

    def _sample(self, step: StepBuilder, request: Request) -> None:
        """The step reaches the request's last token: it samples, for every choice."""
        position = request.num_tokens
        for choice, row in enumerate(request.spare_rows, 1):
            child = request.fork(self.new_key(), choice, row)
            self.blocks.fork(request.key, child.key)
            step.fork(request, child, position, self.blocks.tables(child.key))
            child.num_in_flight = 1
        request.choices, request.spare_rows = 1, []
        step.sample(request, request.row, position)
        request.num_in_flight += 1

    def _publish(self, request: Request) -> None:
        """Let the blocks that are computed and known be found."""
        start, end = request.num_published, min(request.num_computed, request.num_known) // self.blocks.block_size
        if end > start and self.blocks.prefix_caching:
            request.extend_hashes(self.blocks.block_size)
            self.blocks.publish(request.key, request.hashes[start:end], start, request.last_step)
            request.num_published = end

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks and row; it is recomputed once its in-flight steps are updated."""
        self._leave(request)
        request.num_computed = request.num_published = request.steady_end = 0
        self._enqueue(request)
        self.counters.num_preemptions += 1

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.free(request.key)
        for row in (request.row, *request.spare_rows):
            self._rows.release(row)
        request.spare_rows = []

    # -- update -----------------------------------------------------------------------------------------------------

    def update(self, output: StepOutput) -> list[TokenEvent]:
        """Take the output of the oldest step in flight; what it means for each request."""
        step = self._in_flight.popleft()
        assert step.step_id == output.step_id, f"output of step {output.step_id}, but {step.step_id} is the oldest"
        if output.error is not None:
            self._fail(step, output.error)
        else:
            self.blocks.settle(step.step_id)
            for prompt in output.prompt_logprobs:
                self._take_prompt(step.requests[prompt.index], prompt)
            self._take(step.sampled, output.token_ids, output.logprobs or repeat(None, len(output.token_ids)))
            if output.kv_counts is not None:
                self.counters.num_kv_clipped, self.counters.num_kv_written = output.kv_counts
        events, self._events = self._events, []
        return events

    def _take_prompt(self, request: Request | None, prompt: PromptLogprobs) -> None:
        # A preempted choice computes the prompt too, which choice 0 tells.
        if request is None or request.finished or request.choice:
            return
        # After a preemption the prompt is computed again; what was told stays told.
        news = prompt.logprobs[max(0, request.num_prompt_logprobs - prompt.start) :]
        if news:
            request.num_prompt_logprobs = prompt.start + len(prompt.logprobs)
            self._tell(request, []).prompt_logprobs.extend(news)

    def _take(
        self, sampled: Sequence[Request | None], token_ids: list[int], logprobs: Iterable[TokenLogprob | None]
    ) -> None:
        """Each request's token. What is done for all of them is all done here: it is a good part of a step."""
        finished, running, block_size = Status.FINISHED, Status.RUNNING, self.blocks.block_size
        num_before = len(self._events)
        for request, token_id, logprob in zip(sampled, token_ids, logprobs, strict=True):
            if request is None or request.status is finished:
                continue
            output = request.output_token_ids
            output.append(token_id)
            request.num_in_flight -= 1
            if (len(request.prompt_token_ids) + len(output)) % block_size == 0 and request.status is running:
                self._publish(request)
            event = self._tell(request, [token_id])
            if logprob is not None:
                event.logprobs.append(logprob)
            if len(output) >= request.max_output_tokens or token_id in request.stops:
                stop = request.stop_reason(token_id, self.eos_token_ids)
                if stop is not None:
                    event.finish_reason, event.stop_reason = stop
                    self._finish(request)
        self.counters.num_generated_tokens += len(self._events) - num_before

    def _tell(self, request: Request, token_ids: list[int]) -> TokenEvent:
        """A new event of the request, for the caller to complete."""
        num_cached = None if request.choice else request.num_cached
        event = TokenEvent(request.id, request.choice, token_ids, num_cached_tokens=num_cached)
        self._events.append(event)
        return event

    def _finish(self, request: Request) -> None:
        if request.status is Status.RUNNING:
            self._leave(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def _fail(self, step: _InFlight, error: str) -> None:
        """End the step's requests, and restart those that may have built on blocks which it should have filled."""
        self.blocks.withdraw_since(step.step_id)
        for request in step.requests:
            if request is not None and not request.finished:
                self._finish(request)
                # Choices that have not forked off yet end with it.
                for choice in range(request.choice, request.choice + request.choices):
                    self._events.append(TokenEvent(request.id, choice, [], finish_reason="error", error=error))
        lost = [request for request in (*self.running, *self.waiting) if request.shared_step > step.step_id]
        for later in self._in_flight:
            later.forget(lost)
        for request in lost:
            request.num_in_flight = 0
            if request.status is Status.RUNNING:
                self._preempt(request)

    # -- accounts ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> EngineStats:
        """Counters and gauges now."""
        for request in self.running:
            self.blocks.advance(request.key, request.num_computed)
        slots, wasted = self.blocks.num_slots_used, self.blocks.num_slots_wasted
        pool = self.blocks.pool
        return EngineStats(
            **asdict(self.counters),
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_blocks=pool.num_blocks - 1,
            num_blocks_used=pool.num_used,
            kv_usage=pool.num_used / max(1, pool.num_blocks - 1),
            kv_slots=slots,
            kv_tokens=slots - wasted,
        )
