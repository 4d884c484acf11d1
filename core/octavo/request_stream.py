"""A request's deltas between the engine's link and whoever wants them, and those who only watch."""

import asyncio
from typing import Self

from octavo.engine.step import EngineStats
from octavo.errors import OctavoError
from octavo.output_processor import Delta, OutputProcessor, joined
from octavo.sampling_params import SamplingParams


class Observer:
    """Told what happens to requests, by their keys, and how the engine fares; does nothing itself."""

    def opened(self, key: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """A request is sent to the engine."""

    def started(self, key: str, seconds: float) -> None:
        """A request begins to run, after waiting this long in the engine."""

    def gained(self, key: str, delta: Delta) -> None:
        """A choice of a request gains something."""

    def closed(self, key: str) -> None:
        """A request is over, or nobody wants the rest of it."""

    def fared(self, stats: EngineStats) -> None:
        """The engine's counters and gauges are these now."""


class RequestStream:
    """A request's deltas on their way from the socket to whoever iterates over them.

    Who falls behind gets what came meanwhile as one delta a choice, which costs as much as one token.
    """

    def __init__(self, processor: OutputProcessor) -> None:
        self.processor = processor
        self.error: OctavoError | None = None
        self._deltas: dict[tuple[int, bool], list[Delta]] = {}
        self._changed = asyncio.Event()

    def put(self, delta: Delta) -> None:
        """Hand on what a choice gained. An error stays on its own, so that what came before it is not lost with it."""
        self._deltas.setdefault((delta.index, delta.error is not None), []).append(delta)
        self._changed.set()

    def fail(self, error: OctavoError) -> None:
        """End the stream with an error, once what it has is read."""
        self.error = error
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while not self._deltas:
            if self.processor.finished:
                raise StopAsyncIteration
            if self.error is not None:
                raise self.error
            await self._changed.wait()
            self._changed.clear()
        return joined(self._deltas.pop(next(iter(self._deltas))))


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def opened(self, key: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Tell all."""
        for one in self._observers:
            one.opened(key, prompt_token_ids, params)

    def started(self, key: str, seconds: float) -> None:
        """Tell all."""
        for one in self._observers:
            one.started(key, seconds)

    def gained(self, key: str, delta: Delta) -> None:
        """Tell all."""
        for one in self._observers:
            one.gained(key, delta)

    def closed(self, key: str) -> None:
        """Tell all."""
        for one in self._observers:
            one.closed(key)

    def fared(self, stats: EngineStats) -> None:
        """Tell all."""
        for one in self._observers:
            one.fared(stats)
