"""The engine: requests in, token events out, with several steps in flight."""

import random
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from octavo.admission import check_request
from octavo.engine.block_manager import BlockManager
from octavo.engine.executor import Capacity, Executor
from octavo.engine.request import Request
from octavo.engine.scheduler import Scheduler, SchedulerLimits
from octavo.engine.step import EngineStats, StepInput, StepOutput, TokenEvent
from octavo.errors import OctavoError, RequestError
from octavo.sampling_params import SamplingParams

_SEED_BITS = 63


class Engine:
    """Schedules requests onto an executor. One thread calls it.

    `max_steps_in_flight` steps are submitted before the output of the first is awaited, so that the device computes one
    while the host prepares the next.
    """

    def __init__(
        self,
        executor: Executor,
        capacity: Capacity,
        *,
        limits: SchedulerLimits | None = None,
        prefix_caching: bool = True,
        max_steps_in_flight: int | None = None,
        max_logprobs: int = 20,
        seed: int = 0,
    ) -> None:
        self.capacity = capacity
        self._executor = executor
        blocks = BlockManager(capacity.num_blocks, capacity.block_size, capacity.groups, prefix_caching=prefix_caching)
        limits = limits or SchedulerLimits(max_requests=capacity.max_requests, max_tokens=capacity.max_tokens)
        self.scheduler = Scheduler(limits, blocks, capacity.eos_token_ids)
        self._depth = max_steps_in_flight or capacity.max_steps_in_flight
        self._max_logprobs = max_logprobs
        self._in_flight: deque[tuple[StepInput, Future[StepOutput]]] = deque()
        self._refused = False
        self._random = random.Random(seed)
        self.on_shutdown: Callable[[], object] = lambda: None

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queue a request. Raises RequestError, and queues nothing, for one that cannot be served."""
        self._check(prompt_token_ids, params)
        room = self.capacity.max_model_len - len(prompt_token_ids)
        seed = self._random.getrandbits(_SEED_BITS) if params.seed is None else params.seed
        self.scheduler.add(
            Request(
                request_id,
                self.scheduler.new_key(),
                list(prompt_token_ids),
                params,
                min(room, params.max_tokens or room),
                seed,
                choices=params.n,
                priority=priority,
                cache_salt=cache_salt or "",
            )
        )

    def _check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        capacity, most = self.capacity, self.scheduler.limits.max_requests
        check_request(
            prompt_token_ids,
            params,
            max_model_len=capacity.max_model_len,
            vocab_size=capacity.vocab_size,
            max_logprobs=self._max_logprobs,
        )
        if params.n > most:
            raise RequestError(f"n is {params.n}, but the engine runs at most {most} requests at once.", "n")

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one choice of it, at once and without an event. Unknown ids are ignored."""
        self.scheduler.abort(request_id, choice)

    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self.scheduler.has_requests or bool(self._in_flight)

    @property
    def started(self) -> list[str]:
        """Ids of the requests that began to run in the last call of `step`."""
        return self.scheduler.started

    def step(self) -> list[TokenEvent]:
        """Submit what may be submitted, wait for the oldest step, and say what it means."""
        self.scheduler.started.clear()
        while len(self._in_flight) < self._depth and not self._refused:
            step = self.scheduler.schedule()
            if step is None:
                break
            self._in_flight.append((step, self._submit(step)))
        if not self._in_flight:
            return []
        step, future = self._in_flight.popleft()
        self._refused = self._refused and bool(self._in_flight)
        events = self.scheduler.update(_result(step, future))
        if not self.has_work():
            self.scheduler.blocks.check_idle()
        return events

    def _submit(self, step: StepInput) -> "Future[StepOutput]":
        try:
            return self._executor.sample(self._executor.submit(step))
        except Exception as error:
            # A step behind this one would build on changes that the executor never made.
            self._refused = True
            failed: Future[StepOutput] = Future()
            failed.set_exception(error)
            return failed

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, with nothing changed, while requests run."""
        if self.has_work():
            return False
        self.scheduler.blocks.reset_prefix_cache()
        return True

    def stats(self) -> EngineStats:
        """Counters and gauges now."""
        return self.scheduler.snapshot()

    def health(self) -> str | None:
        """None when the executor's workers are well, else one sentence."""
        return self._executor.health()

    def shutdown(self) -> None:
        """End the executor. Requests that still run are lost."""
        self.on_shutdown()
        self._executor.shutdown()


def _result(step: StepInput, future: "Future[StepOutput]") -> StepOutput:
    try:
        return future.result()
    except OctavoError as error:
        return StepOutput(step.step_id, error=str(error))
    except Exception as error:
        return StepOutput(step.step_id, error=f"The step failed with {type(error).__name__}: {error}")
