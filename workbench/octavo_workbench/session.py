"""An engine in this process that runs workloads and counts what it did."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from octavo.config import EngineConfig
from octavo.engine.step import EngineStats, TokenEvent
from octavo.errors import StepError
from octavo.garbage import spare_garbage_collection
from octavo.sampling_params import SamplingParams
from octavo.start import start_engine
from tqdm import tqdm

from octavo_workbench.workloads import Job

StepObserver = Callable[[float, EngineStats], None]
"""Told the seconds that each step took, and the engine's counters and gauges after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run of a workload took and did."""

    seconds: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_steps: int
    num_preemptions: int

    @property
    def output_tokens_per_s(self) -> float:
        """Generated tokens per second of the whole run, prefill included."""
        return self.num_output_tokens / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Prompt and generated tokens per second."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds


class Session:
    """A started engine, in a process that is its own.

    Generation is greedy and ignores the end-of-sequence token, so that every run is the same work.

    Raises what `start_engine` does.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.engine, self.info = start_engine(config)
        spare_garbage_collection()  # as the engine's own process does
        self._num_runs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.shutdown()

    def run(self, jobs: Sequence[Job], *, observe: StepObserver | None = None, progress: str = "") -> Run:
        """Run all jobs at once; `progress` names the bar, none is shown without a name.

        Raises RequestError for a job that does not fit the model, StepError when one does not end as it should.
        """
        before = self.engine.stats()
        self._add(jobs)
        begin = time.perf_counter()
        with tqdm(total=len(jobs), desc=progress, unit="request", leave=False, disable=not progress) as bar:
            self._step_through(bar, observe)
        return self._account(jobs, time.perf_counter() - begin, before)

    def _add(self, jobs: Sequence[Job]) -> None:
        self._num_runs += 1
        for number, job in enumerate(jobs):
            params = SamplingParams(temperature=0.0, max_tokens=job.num_output_tokens, ignore_eos=True)
            self.engine.add_request(f"{self._num_runs}-{number}", job.prompt_token_ids, params)

    def _step_through(self, bar: "tqdm[Any]", observe: StepObserver | None) -> None:
        while self.engine.has_work():
            begin = time.perf_counter()
            events = self.engine.step()
            seconds = time.perf_counter() - begin
            finished = sum(_is_last(event) for event in events)
            if finished:
                bar.update(finished)
            if observe is not None:
                observe(seconds, self.engine.stats())

    def _account(self, jobs: Sequence[Job], seconds: float, before: EngineStats) -> Run:
        after = self.engine.stats()
        wanted = sum(job.num_output_tokens for job in jobs)
        generated = after.num_generated_tokens - before.num_generated_tokens
        if generated != wanted:
            raise StepError(f"The workload asks for {wanted} tokens, but the engine generated {generated}.")
        return Run(
            seconds=seconds,
            num_requests=len(jobs),
            num_prompt_tokens=sum(len(job.prompt_token_ids) for job in jobs),
            num_output_tokens=generated,
            num_cached_tokens=after.num_cached_tokens - before.num_cached_tokens,
            num_steps=after.num_steps - before.num_steps,
            num_preemptions=after.num_preemptions - before.num_preemptions,
        )


def _is_last(event: TokenEvent) -> bool:
    if event.finish_reason == "error":
        raise StepError(f"Request {event.request_id} of the workload failed: {event.error}.")
    return event.finish_reason is not None
