"""Server-sent events, several streams as one, and clients that leave."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from octavo.output_processor import Delta, joined
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")
_encoder = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    """One server-sent event that holds `body` as JSON."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


class JSONAnswer(Response):
    """An answer whose body is JSON, encoded quickly."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """`content` as JSON."""
        return _encoder.encode(content)


class EventStream(Response):
    """Sends events as they come. When the client leaves, the generator of events is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI)."""
        async with contextlib.aclosing(self._events):
            await _until_gone(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._events:
            await send(_body(chunk, more=True))
        await send(_body(b"", more=False))


def _body(chunk: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, with `work` cancelled, when the client leaves first."""
    return await _until_gone(request.receive, work)


async def _until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, which begins at once: as a task it would wait behind all requests that came meanwhile."""
    gone = asyncio.create_task(_disconnect(receive))
    try:
        async with asyncio.timeout(None) as patience:
            over = False

            def end(_: "asyncio.Task[None]") -> None:
                if not over:  # both may end at once
                    patience.reschedule(0.0)

            gone.add_done_callback(end)
            try:
                return await work
            finally:
                over = True
    except TimeoutError:
        if not patience.expired():
            raise
        return None
    finally:
        await cancel([gone])


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait until their clean-up has run."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def spaced(
    parts: AsyncGenerator[tuple[int, Delta], None], interval: int
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The same deltas, joined until they hold `interval` tokens. A choice's first token and its end do not wait."""
    held: dict[tuple[int, int], Delta] = {}
    begun: set[tuple[int, int]] = set()
    async with contextlib.aclosing(parts):
        async for prompt, delta in parts:
            key = (prompt, delta.index)
            if delta.error is not None and key in held:
                yield prompt, held.pop(key)  # which would be lost with the error
            whole = joined([held.pop(key), delta]) if key in held else delta
            if key in begun and len(whole.token_ids) < interval and whole.finish_reason is None:
                held[key] = whole
                continue
            begun.add(key)
            yield prompt, whole


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's number. The first exception ends them all."""
    if len(streams) == 1:  # the usual case needs no queue
        async with contextlib.aclosing(streams[0]) as only:
            async for first in only:
                yield 0, first
        return
    items: asyncio.Queue[tuple[int, T] | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async for item in stream:
                items.put_nowait((number, item))
        finally:
            items.put_nowait(None)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await items.get()
            if item is not None:
                yield item
                continue
            num_open -= 1
            for task in tasks:
                if task.done():
                    task.result()  # raises what the stream raised
    finally:
        await cancel(tasks)
