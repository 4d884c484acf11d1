"""An engine without a model: each choice repeats the prompt's tokens, one a step, until its max_tokens.

A prompt that holds token CRASH makes the step raise, EXIT ends the process, HANG keeps the step from ending and the
interpreter to itself, FAIL ends the request in an error, and STOP ends it as an eos token does.
"""

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from octavo.admission import EngineInfo
from octavo.config import EngineConfig
from octavo.engine.step import EngineStats, TokenEvent, TokenLogprob
from octavo.errors import ConfigError, RequestError
from octavo.sampling_params import SamplingParams

VOCAB_SIZE = 300
NUM_BLOCKS, BLOCK_SIZE = 10, 16
MAX_MODEL_LEN = 64
MAX_CHOICES = 8
HANG, CRASH, EXIT, FAIL, STOP = 250, 251, 252, 253, 254
Progress = Callable[[str], None] | None


@dataclass
class _Running:
    prompt: list[int]
    params: SamplingParams
    choices: set[int] = field(default_factory=set)
    step: int = 0


class FakeEngine:
    """Has the engine's methods; `step_seconds` is what a step takes."""

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
        self.running: dict[str, _Running] = {}
        self.aborted: list[tuple[str, int | None]] = []
        self.num_resets = 0
        self.num_steps = 0
        self.num_generated = 0
        self.num_prompt = 0
        self.num_cached = 0
        self.started: list[str] = []

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        if params.n > MAX_CHOICES:
            raise RequestError(f"n is {params.n}, but at most {MAX_CHOICES} run.", "n")
        self.num_prompt += len(prompt_token_ids)
        self.num_cached += len(prompt_token_ids) // 2
        self.running[request_id] = _Running(prompt_token_ids, params, set(range(params.n)))

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self.aborted.append((request_id, choice))
        request = self.running.get(request_id)
        if request is not None:
            request.choices -= request.choices if choice is None else {choice}
            self._sweep()

    def has_work(self) -> bool:
        return bool(self.running)

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_seconds)
        self.num_steps += 1
        self.started = [request_id for request_id, request in self.running.items() if request.step == 0]
        events = [
            self._event(request_id, request, choice)
            for request_id, request in self.running.items()
            for choice in sorted(request.choices)
        ]
        for request in self.running.values():
            request.step += 1
        for event in events:
            if event.finish_reason is not None:
                self.running[event.request_id].choices.discard(event.choice)
        self._sweep()
        self.num_generated += len(events)
        return events

    def reset_prefix_cache(self) -> bool:
        self.num_resets += not self.running
        return not self.running

    def stats(self) -> EngineStats:
        """Each request holds one block, which is partly filled."""
        return EngineStats(
            num_running=len(self.running),
            kv_usage=len(self.running) / NUM_BLOCKS,
            kv_slots=len(self.running) * BLOCK_SIZE,
            kv_tokens=len(self.running),
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached,
            num_prompt_tokens_computed=self.num_prompt - self.num_cached,
            num_steps=self.num_steps,
            num_generated_tokens=self.num_generated,
            num_kv_clipped=self.num_prompt,
            num_kv_written=4 * self.num_prompt,
        )

    def shutdown(self) -> None:
        self.running.clear()

    def _sweep(self) -> None:
        self.running = {name: request for name, request in self.running.items() if request.choices}

    def _event(self, request_id: str, request: _Running, choice: int) -> TokenEvent:
        if CRASH in request.prompt:
            raise RuntimeError("the kernel is broken")
        if EXIT in request.prompt:
            os._exit(3)
        if HANG in request.prompt:
            ctypes.PyDLL(None).sleep(600)
        token = request.prompt[(request.step + choice) % len(request.prompt)]
        reason = self._reason(request, token)
        first = request.step == 0 and choice == 0
        return TokenEvent(
            request_id,
            choice,
            [] if reason == "error" else [token],
            [] if request.params.logprobs is None else [logprob(token, request.params.logprobs)],
            self._prompt_logprobs(request) if first else [],
            reason,
            num_cached_tokens=len(request.prompt) // 2 if first else None,
            error="the step failed on purpose" if reason == "error" else None,
        )

    def _reason(self, request: _Running, token: int) -> str | None:
        if FAIL in request.prompt:
            return "error"
        if token == STOP and not request.params.ignore_eos:
            return "stop"
        longest = request.params.max_tokens or MAX_MODEL_LEN - len(request.prompt)
        return "length" if request.step + 1 >= longest else None

    def _prompt_logprobs(self, request: _Running) -> list[TokenLogprob]:
        number = request.params.prompt_logprobs
        return [] if number is None else [logprob(token, number) for token in request.prompt[1:]]


class FullEngine(FakeEngine):
    """Takes requests, and never makes a step for them."""

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_seconds)
        return []

    def stats(self) -> EngineStats:
        return EngineStats(num_waiting=len(self.running))


def logprob(token: int, number: int) -> TokenLogprob:
    """The token is the second most likely; the others are the ids from 10 on."""
    top = [10, token, *range(11, 11 + number)][:number]
    return TokenLogprob(-1.0, 2, top, [-0.5 * rank for rank in range(1, number + 1)])


def backend(kind: str, name: str) -> dict[str, Any]:
    """A selection as the engine tells it."""
    candidates = [
        {"name": name, "plugin": "fake", "chosen": True, "reason": None},
        {"name": "other", "plugin": "fake", "chosen": False, "reason": "it is not there"},
    ]
    origin = {"plugin": "fake", "distribution": "fakes", "version": "1.0"}
    return {"kind": kind, "name": name, **origin, "options": {}, "candidates": candidates}


def info() -> EngineInfo:
    return EngineInfo(
        model="fake",
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        max_requests=MAX_CHOICES,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        kv_bytes_per_token=100.0,
        kv_scales="calibrated now",
        dtype="float32",
        device="cpu",
        backends=[backend("attention", "one"), backend("matmul", "two"), backend("matmul", "two")],
        generation_config={"temperature": 0.5, "top_k": None},
    )


def start(config: EngineConfig, progress: Progress = None) -> tuple[FakeEngine, EngineInfo]:
    """A quick engine."""
    return FakeEngine(), info()


def start_slow(config: EngineConfig, progress: Progress = None) -> tuple[FakeEngine, EngineInfo]:
    """An engine that needs a moment for each token."""
    return FakeEngine(step_seconds=0.02), info()


def start_full(config: EngineConfig, progress: Progress = None) -> tuple[FakeEngine, EngineInfo]:
    """An engine that has room for nobody."""
    return FullEngine(step_seconds=0.02), info()


def start_late(config: EngineConfig, progress: Progress = None) -> tuple[FakeEngine, EngineInfo]:
    """An engine that takes a while to start and tells its phases."""
    assert progress is not None
    for phase in ("loading weights", "warming up"):
        progress(phase)
        time.sleep(0.3)
    return FakeEngine(), info()


def refuse(config: EngineConfig, progress: Progress = None) -> tuple[FakeEngine, EngineInfo]:
    """A start that refuses the configuration."""
    raise ConfigError(f"block_size is {config.block_size}, which this engine does not like.")


def break_down(config: EngineConfig, progress: Progress = None) -> tuple[FakeEngine, EngineInfo]:
    """A start with a bug."""
    raise ZeroDivisionError("a bug")


def die(config: EngineConfig, progress: Progress = None) -> tuple[FakeEngine, EngineInfo]:
    """A start that ends the process."""
    os._exit(7)
