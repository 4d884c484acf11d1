"""What one client, or all together, may ask for at once: bodies, open requests, the queue."""

from collections import Counter

from fastapi import FastAPI, Request
from octavo.async_engine import AsyncEngine
from octavo.output_processor import Delta
from octavo.request_stream import Observer
from octavo.sampling_params import SamplingParams
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo_server.problems import problem
from octavo_server.security import key_of, route_of
from octavo_server.settings import ServerSettings

_RETRY_SECONDS = 1
_RETRY = {"Retry-After": str(_RETRY_SECONDS)}


class BodyTooLargeError(HTTPException):
    """A body is larger than allowed; of this kind, so that FastAPI lets it pass while it reads a body."""


def _too_large(found: str, max_bytes: int) -> JSONResponse:
    message = f"The request has a body {found}, but at most {max_bytes} are taken (--max-body-bytes)."
    return JSONResponse(problem(message, "invalid_request_error", code="body_too_large"), 413)


async def _on_too_large(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BodyTooLargeError)
    return _too_large(f"of more than {error.detail} bytes", int(error.detail))


class BodyLimit:
    """Middleware: 413 for a body of more than `max_bytes`, by its Content-Length or as soon as so much has come.

    The connection stays open and the rest of the body is dropped as it comes: closing it would lose the answer too.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, with its body counted, or answer 413 (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            await _too_large(f"of {length} bytes", self._max_bytes)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise BodyTooLargeError(413, str(self._max_bytes))
            return message

        return counted


class ConcurrencyLimit:
    """Middleware: 429 for a key that has `max_open` requests open already. Only POST counts: the rest is cheap."""

    def __init__(self, app: ASGIApp, max_open: int) -> None:
        self._app = app
        self._max_open = max_open
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counted while it runs, or answer 429 (ASGI)."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        key = key_of(scope)
        if self._open[key] >= self._max_open:
            await self._refusal(key)(scope, receive, send)
            return
        self._open[key] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open[key] -= 1
            self._open += Counter()  # drops keys at 0

    def _refusal(self, key: str) -> JSONResponse:
        whose = "This API key has" if key else "This server has"
        message = (
            f"{whose} {self._open[key]} requests open, but at most {self._max_open} are allowed at once. Try again."
        )
        return JSONResponse(problem(message, "rate_limit_error", code="rate_limit_exceeded"), 429, _RETRY)


class PromptsWaiting(Observer):
    """Counts the prompt tokens of requests that the engine has, but has not begun to compute."""

    def __init__(self) -> None:
        self._waiting: dict[str, int] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens that wait."""
        return sum(self._waiting.values())

    def opened(self, key: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """A request waits."""
        self._waiting[key] = len(prompt_token_ids)

    def started(self, key: str, seconds: float) -> None:
        """It waits no more."""
        self._waiting.pop(key, None)

    def gained(self, key: str, delta: Delta) -> None:
        """It waits no more."""
        self._waiting.pop(key, None)

    def closed(self, key: str) -> None:
        """It is gone."""
        self._waiting.pop(key, None)


class QueueLimit:
    """Middleware: 503 for a request that would wait for the engine behind too many others, or too many tokens.

    A request waits when the engine already has as many as it runs at once, or has no blocks for more.
    """

    def __init__(
        self,
        app: ASGIApp,
        engine: AsyncEngine,
        prompts: PromptsWaiting,
        max_requests: int | None,
        max_tokens: int | None,
    ) -> None:
        self._app = app
        self._engine = engine
        self._prompts = prompts
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counted while it runs, or answer 503 (ASGI)."""
        counts = scope["type"] == "http" and scope["method"] == "POST" and route_of(scope).startswith("/v1/")
        if not counts or not self._engine.ready:
            await self._app(scope, receive, send)
            return
        if (why := self._why_not()) is not None:
            body = problem(f"{why} Try again in a moment.", "service_unavailable", code="queue_full")
            await JSONResponse(body, 503, _RETRY)(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= 1

    def _why_not(self) -> str | None:
        seats = self._engine.info.max_requests
        # Requests on their way to the engine count too: a burst comes faster than the engine's counters.
        num_waiting = max(self._num_open - seats, self._engine.stats_seen.num_waiting)
        if num_waiting <= 0 and self._num_open < seats:
            return None
        if self._max_requests is not None and num_waiting >= self._max_requests:
            return f"{num_waiting} requests wait already, but at most {self._max_requests} may (--max-num-queued-reqs)."
        num_tokens = self._prompts.num_tokens
        if self._max_tokens is not None and num_tokens >= self._max_tokens:
            return f"{num_tokens} prompt tokens wait, but at most {self._max_tokens} may (--max-num-queued-tokens)."
        return None


def limit(app: FastAPI, settings: ServerSettings, engine: AsyncEngine) -> Observer | None:
    """Put the limits of the settings on an app. Returns an observer that the engine must have for them, if any."""
    prompts = None
    app.add_exception_handler(BodyTooLargeError, _on_too_large)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.max_num_queued_reqs is not None or settings.max_num_queued_tokens is not None:
        prompts = PromptsWaiting()
        app.add_middleware(
            QueueLimit,
            engine=engine,
            prompts=prompts,
            max_requests=settings.max_num_queued_reqs,
            max_tokens=settings.max_num_queued_tokens,
        )
    if settings.max_concurrency_per_key is not None:
        app.add_middleware(ConcurrencyLimit, max_open=settings.max_concurrency_per_key)
    return prompts
