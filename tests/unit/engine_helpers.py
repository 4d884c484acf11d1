"""A rig that drives the scheduler with the model of hashes, keeps all events, and compares them with the oracle."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hash_model import Handle, HashExecutor
from hash_oracle import EOS_TOKEN_IDS, VOCAB_SIZE, Expected, expect, expect_prompt_logprobs
from octavo.engine.block_manager import BlockManager, KVGroup
from octavo.engine.executor import Capacity
from octavo.engine.request import Request
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import StepInput, StepOutput, TokenEvent, TokenLogprob
from octavo.sampling_params import SamplingParams

MAX_MODEL_LEN = 64
FULL = (KVGroup(),)


def capacity_of(
    num_blocks: int = 64,
    block_size: int = 4,
    groups: tuple[KVGroup, ...] = FULL,
    max_model_len: int = MAX_MODEL_LEN,
    max_requests: int = 8,
    max_tokens: int = 32,
    max_steps_in_flight: int = 2,
) -> Capacity:
    """A small executor's capacity; `num_blocks` counts the null block."""
    return Capacity(
        num_blocks=num_blocks,
        block_size=block_size,
        groups=groups,
        max_model_len=max_model_len,
        max_requests=max_requests,
        max_tokens=max_tokens,
        vocab_size=VOCAB_SIZE,
        max_steps_in_flight=max_steps_in_flight,
        eos_token_ids=EOS_TOKEN_IDS,
    )


@dataclass
class Told:
    """All that was told of one choice."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_cached_tokens: int | None = None
    aborted: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing more may be told."""
        return self.aborted or self.finish_reason is not None


@dataclass
class Asked:
    """A request and what came of its choices."""

    prompt: list[int]
    params: SamplingParams
    seed: int
    most: int
    choices: list[Told]


class Ledger:
    """Requests by id, with the events that they got. It notes events of a choice that has ended already."""

    def __init__(self, groups: Sequence[KVGroup]) -> None:
        self.groups = groups
        self.asked: dict[str, Asked] = {}

    def add(self, request_id: str, prompt: list[int], params: SamplingParams, seed: int, most: int) -> None:
        """A request is queued."""
        self.asked[request_id] = Asked(prompt, params, seed, most, [Told() for _ in range(params.n)])

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """No event may come any more for the request or one choice of it."""
        choices = self.asked[request_id].choices
        for told in choices if choice is None else [choices[choice]]:
            told.aborted = told.aborted or not told.ended

    def take(self, events: list[TokenEvent]) -> None:
        """Note what the events say."""
        for event in events:
            told = self.asked[event.request_id].choices[event.choice]
            assert not told.ended, f"{event} comes after the end"
            told.token_ids += event.token_ids
            told.logprobs += event.logprobs
            told.prompt_logprobs += event.prompt_logprobs
            told.finish_reason, told.stop_reason, told.error = event.finish_reason, event.stop_reason, event.error
            if event.num_cached_tokens is not None:
                told.num_cached_tokens = event.num_cached_tokens

    def expected(self, request_id: str, choice: int) -> Expected:
        """What the oracle says of the choice."""
        asked = self.asked[request_id]
        return expect(self.groups, asked.prompt, asked.params, asked.seed, choice, asked.most)

    def verify(self, doomed: set[tuple[str, int]] | None = None) -> None:
        """Every choice ended once, in the oracle's tokens; errors only for `doomed` choices, None allows any."""
        for request_id, asked in self.asked.items():
            for choice, told in enumerate(asked.choices):
                self._verify(request_id, choice, told, doomed)
            told = asked.choices[0]
            if asked.params.prompt_logprobs is not None:
                whole = expect_prompt_logprobs(self.groups, asked.prompt)
                known = told.prompt_logprobs
                assert known == (whole if told.token_ids else whole[: len(known)]), f"prompt logprobs of {request_id}"
            else:
                assert told.prompt_logprobs == []
            assert all(other.prompt_logprobs == [] for other in asked.choices[1:]), "choice 0 tells of the prompt"

    def _verify(self, request_id: str, choice: int, told: Told, doomed: set[tuple[str, int]] | None) -> None:
        name = f"choice {choice} of {request_id}"
        assert told.ended, f"{name} has not ended"
        expected = self.expected(request_id, choice)
        num_told = len(told.token_ids)
        assert told.token_ids == expected.token_ids[:num_told], f"{name} has other tokens"
        if self.asked[request_id].params.logprobs is not None:
            assert told.logprobs == expected.logprobs[:num_told], f"{name} has other logprobs"
        if told.finish_reason == "error":
            assert told.error, f"{name} ends in an error without a reason"
            assert doomed is None or (request_id, choice) in doomed, f"{name} fails without a failed step"
        elif not told.aborted:
            assert num_told == len(expected.token_ids), f"{name} is too short"
            assert (told.finish_reason, told.stop_reason) == (expected.finish_reason, expected.stop_reason), name


class Rig:
    """A scheduler on the model of hashes, one call at a time: `submit` a step, `deliver` the oldest output."""

    def __init__(
        self,
        capacity: Capacity | None = None,
        *,
        prefix_caching: bool = True,
        reuse_poisoned: bool = True,
        **limits: Any,
    ) -> None:
        self.capacity = capacity or capacity_of()
        self.executor = HashExecutor(self.capacity)
        self.blocks = BlockManager(
            self.capacity.num_blocks, self.capacity.block_size, self.capacity.groups, prefix_caching=prefix_caching
        )
        limits = {"max_requests": self.capacity.max_requests, "max_tokens": self.capacity.max_tokens} | limits
        self.scheduler = Scheduler(SchedulerLimits(**limits), self.blocks, EOS_TOKEN_IDS)
        self.ledger = Ledger(self.capacity.groups)
        self.doomed: set[tuple[str, int]] = set()
        self.outputs: deque[StepOutput] = deque()
        self._refused = False
        self.executor.free_blocks = self._free_blocks

    def _free_blocks(self) -> list[int]:
        """Free blocks that no prefix hit can find."""
        pool = self.blocks.pool
        published = set(pool._by_key.values())
        return [block for block in range(1, pool.num_blocks) if not pool.refs(block) and block not in published]

    # -- requests ----------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Sequence[int] | int,
        *,
        name: str = "",
        seed: int = 1,
        priority: int = 0,
        salt: str = "",
        sync: bool = False,
        **params: Any,
    ) -> str:
        """Queue a request for a prompt, or for one of this many tokens; its id."""
        tokens = list(range(100, 100 + prompt)) if isinstance(prompt, int) else list(prompt)
        name = name or f"request-{len(self.ledger.asked)}"
        sampling = SamplingParams(**{"ignore_eos": True, "max_tokens": 4} | params)
        room = self.capacity.max_model_len - len(tokens)
        most = min(room, sampling.max_tokens or room)
        self.ledger.add(name, tokens, sampling, seed, most)
        request = Request(
            name,
            self.scheduler.new_key(),
            tokens,
            sampling,
            most,
            seed,
            choices=sampling.n,
            priority=priority,
            cache_salt=salt,
            sync=sync,
        )
        self.scheduler.add(request)
        return name

    def abort(self, name: str, choice: int | None = None) -> None:
        """End a request or a choice of it."""
        self.scheduler.abort(name, choice)
        self.ledger.abort(name, choice)

    def told(self, name: str, choice: int = 0) -> Told:
        """What was told of a choice so far."""
        return self.ledger.asked[name].choices[choice]

    # -- steps -------------------------------------------------------------------------------------------

    def submit(self) -> StepInput | None:
        """Schedule and submit a step; None when nothing can be computed, or a refused step must be told first."""
        if self._refused:
            return None
        step = self.scheduler.schedule()
        if step is not None:
            self.outputs.append(self._compute(step))
        return step

    def must_submit(self) -> StepInput:
        """Submit a step that has something to compute."""
        step = self.submit()
        assert step is not None, "there is nothing to compute"
        return step

    def _compute(self, step: StepInput) -> StepOutput:
        computing = {*step.rows.row, *step.samples.row}
        names = {
            (request.id, request.choice + more)
            for request in self.scheduler.running
            if request.row in computing
            for more in range(request.choices)
        }
        try:
            handle = self.executor.submit(step)
            assert isinstance(handle, Handle)
            output = self.executor.sample(handle).result()
        except RuntimeError as error:
            self._refused = True
            output = StepOutput(step.step_id, error=str(error))
        if output.error is not None:
            self.doomed |= names
        return output

    def deliver(self) -> list[TokenEvent]:
        """Hand the oldest output to the scheduler; its events."""
        output = self.outputs.popleft()
        events = self.scheduler.update(output)
        self._refused = self._refused and bool(self.outputs)
        self.ledger.take(events)
        self.blocks.check()
        return events

    def step(self) -> StepInput:
        """Submit and deliver one step."""
        step = self.must_submit()
        while self.outputs:
            self.deliver()
        return step

    def run(self, depth: int = 1, most: int = 20_000) -> int:
        """Run to the end with `depth` steps in flight, and verify everything; the number of steps."""
        count = 0
        while self.scheduler.has_requests or self.outputs:
            while len(self.outputs) < depth and self.submit() is not None:
                self.blocks.check()
                count += 1
            if self.outputs:
                self.deliver()
            most -= 1
            assert most > 0, "the requests do not come to an end"
        self.verify()
        return count

    def verify(self) -> None:
        """All is told and right, and nothing is held any more."""
        assert self.executor.violations == [], self.executor.violations[:3]
        self.ledger.verify(self.doomed)
        self.verify_idle()

    def verify_idle(self) -> None:
        """Nobody holds a block or a row, and no step is remembered."""
        scheduler = self.scheduler
        self.blocks.check()
        assert self.blocks.pool.num_used == 0
        assert scheduler._rows.num_free == self.capacity.max_requests
        assert (list(scheduler._in_flight), self.blocks._published) == ([], {})


class Dictated(Rig):
    """A rig whose tokens are dictated instead of computed."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self.in_flight: list[StepInput] = []

    def go(self) -> StepInput:
        """Schedule a step and leave it in flight."""
        step = self.scheduler.schedule()
        assert step is not None
        self.in_flight.append(step)
        return step

    def answer(self, *tokens: int, error: str | None = None) -> list[TokenEvent]:
        """The oldest step gives `tokens`, in the order of its samples."""
        step = self.in_flight.pop(0)
        events = self.scheduler.update(StepOutput(step.step_id, list(tokens), error=error))
        self.blocks.check()
        return events

    def say(self, *tokens: int) -> list[TokenEvent]:
        """One step, that gives `tokens`."""
        self.go()
        return self.answer(*tokens)


def shares(step: StepInput | None) -> dict[int, int]:
    """Tokens of each row of a step."""
    assert step is not None
    return {row.row: row.num_tokens for row in step.rows}


def rig_of(prefix_caching: bool = False, limits: dict[str, Any] | None = None, **capacity: Any) -> Rig:
    return Rig(capacity_of(**capacity), prefix_caching=prefix_caching, **limits or {})
