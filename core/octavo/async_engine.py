"""The engine behind a process boundary: text in, deltas out, on an asyncio event loop that imports no torch."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Self

from octavo import errors
from octavo.admission import EngineInfo, check_request
from octavo.config import EngineConfig
from octavo.engine.step import EngineStats, TokenEvent
from octavo.engine_link import EngineLink
from octavo.errors import EngineDeadError, OctavoError, RequestError
from octavo.output_processor import Delta, OutputProcessor
from octavo.outputs import RequestOutput
from octavo.request_stream import Observer, RequestStream
from octavo.sampling_params import SamplingParams
from octavo.text.threads import TextThreads, check_text
from octavo.text.tokenizer import Tokenizer
from octavo.wire import (
    Abort,
    Add,
    Answer,
    Events,
    Failed,
    FromEngine,
    GetStats,
    Phase,
    Ready,
    Refused,
    ResetPrefixCache,
    Start,
    Stop,
    ToEngine,
)

__all__ = ["AsyncEngine", "Observer"]

logger = logging.getLogger("octavo.async_engine")

ENGINE_FACTORY = "octavo.start:start_engine"
_STOP_SECONDS = 10.0


class AsyncEngine:
    """Runs the engine in a process of its own and serves many requests at once.

    `factory` ("module:function") builds the engine in that process. `phase` says how far the start is; `dead` is the
    reason once the engine is gone, and every open request then ends with it. `stats_seen` are the engine's latest
    counters, a fraction of a second old while it works.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        factory: str = ENGINE_FACTORY,
        tokenizer: Tokenizer | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.phase = "starting the engine process"
        self.ready = False
        self.dead: OctavoError | None = None
        self.stats_seen = EngineStats()
        self.observer = Observer()
        self._factory = factory
        self._progress = progress
        self._info: EngineInfo | None = None
        self._tokenizer = tokenizer
        self._threads = TextThreads()
        self._streams: dict[str, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._last_progress = 0.0
        self._link: EngineLink | None = None
        self._reading: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        self._died = asyncio.Event()

    @classmethod
    async def start(cls, config: EngineConfig, **options: Any) -> Self:
        """A ready engine. Raises what the engine's own start raised; takes the options of the constructor."""
        engine = cls(config, **options)
        await engine.launch()
        return engine

    async def launch(self) -> None:
        """Start the process and wait until it takes requests. On failure nothing is left running."""
        try:
            self._link = await EngineLink.open()
            self._reading = asyncio.create_task(self._read(self._link))
            self._send(Start(self.config, self._factory))
            await self._started.wait()
            if self.dead is not None:
                raise self.dead
            if self._tokenizer is None:
                self._tell("loading the tokenizer")
                self._tokenizer = await self._threads.run(0, _load_tokenizer, self.config)
        except BaseException:
            await self.shutdown()
            raise
        self.ready = True
        self._tell("ready")

    @property
    def info(self) -> EngineInfo:
        """Facts of the engine. Raises EngineDeadError before it is ready."""
        if self._info is None:
            raise self.dead or EngineDeadError(f"The engine is not ready yet: {self.phase}.")
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineDeadError before the engine is ready."""
        if self._tokenizer is None:
            raise self.dead or EngineDeadError(f"The engine is not ready yet: {self.phase}.")
        return self._tokenizer

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, found off the event loop. Raises RequestError for a text that cannot fit the context."""
        check_text(text, self.tokenizer, self.info.max_model_len)
        return await self._threads.run(len(text), self.tokenizer.encode, text, add_special_tokens)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Refuse what the engine would refuse, without asking it. Raises RequestError."""
        check_request(
            prompt_token_ids,
            params,
            max_model_len=self.info.max_model_len,
            vocab_size=self.info.vocab_size,
            max_logprobs=self.config.max_logprobs,
        )

    async def generate(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yield what each choice gains, step by step. Closing the iterator frees the request's blocks at once.

        Raises RequestError when the request is refused, EngineDeadError when the engine ends before it.
        """
        key, stream = await self._open(request_id, prompt, params, priority, cache_salt)
        try:
            async for delta in stream:
                yield delta
        finally:
            self._close(key)

    async def complete(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """The whole output of a request; cancelling the call frees its blocks. Raises as `generate` does."""
        key, stream = await self._open(request_id, prompt, params, priority, cache_salt)
        try:
            async for _ in stream:
                pass
        finally:
            self._close(key)
        return stream.processor.output

    async def stats(self) -> EngineStats:
        """The engine's counters and gauges now."""
        result = await self._call(GetStats)
        assert isinstance(result, EngineStats)
        return result

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False, with nothing changed, while requests run."""
        return bool(await self._call(ResetPrefixCache))

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the engine last made a step while requests wait for one; 0 while none does."""
        if not self._streams or self.dead is not None:
            return 0.0
        return asyncio.get_running_loop().time() - self._last_progress

    def kill(self, reason: str) -> None:
        """End the engine process at once, and every open request with an EngineDeadError of this reason."""
        self._end(EngineDeadError(reason))
        if self._link is not None:
            self._link.kill()

    async def wait_dead(self) -> OctavoError:
        """Wait until the engine is gone and return why."""
        await self._died.wait()
        assert self.dead is not None
        return self.dead

    async def shutdown(self, reason: str = "The engine was shut down.") -> None:
        """End the engine process, and what still runs with an EngineDeadError of this reason. May be called again."""
        self._end(EngineDeadError(reason))
        if self._link is not None and self._reading is not None:
            self._send(Stop())
            await asyncio.wait({self._reading}, timeout=_STOP_SECONDS)
            await self._link.close(0.0)
            await self._reading
        self._threads.shutdown()

    async def _open(
        self, request_id: str, prompt: str | list[int], params: SamplingParams, priority: int, cache_salt: str | None
    ) -> tuple[str, RequestStream]:
        text = prompt if isinstance(prompt, str) else None
        token_ids = await self.tokenize(prompt) if isinstance(prompt, str) else prompt
        self.check(token_ids, params)
        if self.dead is not None:
            raise self.dead
        # A number makes ids unique, so that events of an aborted request never reach another of the same id.
        key = f"{request_id}#{next(self._numbers)}"
        stream = RequestStream(OutputProcessor(request_id, text, token_ids, params, self.tokenizer))
        self._send(Add(key, token_ids, params, priority, cache_salt))
        if not self._streams:
            self._note_progress()  # the engine had nothing to do until now
        self._streams[key] = stream
        self.observer.opened(key, token_ids, params)
        return key, stream

    def _close(self, key: str) -> None:
        stream = self._streams.pop(key, None)
        self.observer.closed(key)
        if stream is not None and not stream.processor.finished and stream.error is None:
            self._send(Abort(key))

    async def _call(self, kind: type[GetStats] | type[ResetPrefixCache]) -> EngineStats | bool:
        if self.dead is not None:
            raise self.dead
        number = next(self._numbers)
        answer: asyncio.Future[EngineStats | bool] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self._send(kind(number))
        try:
            return await answer
        finally:
            self._calls.pop(number, None)

    def _send(self, message: ToEngine) -> None:
        if self._link is not None:
            self._link.send(message)

    def _tell(self, phase: str) -> None:
        self.phase = phase
        if self._progress is not None:
            self._progress(phase)

    async def _read(self, link: EngineLink) -> None:
        try:
            while (news := await link.receive()) is not None:
                self._receive(news)
        except Exception as error:
            logger.exception("A message from the engine could not be handled.")
            self._end(EngineDeadError(f"A message from the engine could not be handled: {error}"))
        status = await link.close(_STOP_SECONDS)
        self._end(EngineDeadError(f"The engine process ended unexpectedly ({status})."))

    def _receive(self, news: FromEngine) -> None:
        match news:
            case Events(events, started, stats):
                if events or (stats is not None and stats.num_steps != self.stats_seen.num_steps):
                    self._note_progress()
                for key, seconds in started.items():
                    self.observer.started(key, seconds)
                for event in events:
                    self._deliver(event)
                if stats is not None:
                    self.stats_seen = stats
                    self.observer.fared(stats)
            case Phase(text):
                self._tell(text)
            case Ready(info):
                self._info = info
                self._started.set()
            case Refused(key, message, field):
                if (stream := self._streams.get(key)) is not None:
                    stream.fail(RequestError(message, field))
            case Answer(number, result):
                if (answer := self._calls.get(number)) is not None and not answer.done():
                    answer.set_result(result)
            case Failed(kind, message):
                self._end(_error(kind, message))

    def _note_progress(self) -> None:
        self._last_progress = asyncio.get_running_loop().time()

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is None or (delta := stream.processor.push(event)) is None:
            return
        if delta.abort:
            self._send(Abort(event.request_id, delta.index))
        self.observer.gained(event.request_id, delta)
        stream.put(delta)

    def _end(self, reason: OctavoError) -> None:
        """The engine is gone: tell everybody who waits for it. The first reason counts."""
        if self.dead is not None:
            return
        self.dead = reason
        self.ready = False
        self.phase = str(reason)
        for stream in self._streams.values():
            stream.fail(reason)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(reason)
        self._started.set()
        self._died.set()


def _load_tokenizer(config: EngineConfig) -> Tokenizer:
    from octavo.checkpoints import load_tokenizer

    return load_tokenizer(config)[1]


def _error(kind: str, message: str) -> OctavoError:
    cls = getattr(errors, kind, EngineDeadError)
    return cls(message) if issubclass(cls, OctavoError) else EngineDeadError(message)
