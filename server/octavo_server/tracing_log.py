"""Lines in the log: one for each HTTP request with its id, and on request what is asked and what is answered."""

import dataclasses
import logging
import re
import sys
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar

from fastapi import FastAPI
from octavo.async_engine import AsyncEngine
from octavo.output_processor import Delta
from octavo.request_stream import Observer
from octavo.sampling_params import SamplingParams
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo_server.security import route_of
from octavo_server.settings import ServerSettings

access_logger = logging.getLogger("octavo.access")
request_logger = logging.getLogger("octavo.requests")
http_request: ContextVar[str] = ContextVar("http_request", default="")
"""The id of the HTTP request that is being answered."""

_HEADER = "x-request-id"
_FIT_ID = re.compile(r"[\x21-\x7e]{1,128}")


def configure_logging(settings: ServerSettings) -> None:
    """Let Octavo's loggers write to standard error: warnings, and the lines that the settings ask for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("octavo")
    root.addHandler(handler)
    root.propagate = False
    if settings.uvicorn_log_level in ("info", "debug", "trace") and not settings.disable_uvicorn_access_log:
        access_logger.setLevel(logging.INFO)
    if settings.enable_log_requests:
        request_logger.setLevel(logging.INFO)


class RequestIds:
    """Middleware: gives each HTTP request an id, the client's `X-Request-Id` or a new one, and logs how it went.

    A client's id that is too long, or holds more than visible ASCII, is replaced: it would end up in logs and headers.
    """

    def __init__(self, app: ASGIApp, tell: bool, quiet_routes: Sequence[str] = ()) -> None:
        self._app = app
        self._tell = tell
        self._quiet = frozenset(quiet_routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(_HEADER)
        request_id = given if given is not None and _FIT_ID.fullmatch(given) else uuid.uuid4().hex
        if given is not None and given != request_id:
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0].decode("latin-1") != _HEADER]}
        token = http_request.set(request_id)
        try:
            await self._logged(scope, receive, send, request_id)
        finally:
            http_request.reset(token)

    async def _logged(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        status = 499  # until there is an answer: the client left before
        begin = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._tell:
                    MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if route_of(scope) not in self._quiet:
                seconds = time.perf_counter() - begin
                client = ":".join(map(str, scope.get("client") or ("local",)))
                line = "%s %s %s -> %d in %.3f s, request %s"
                access_logger.info(line, client, scope["method"], ascii(scope["path"]), status, seconds, request_id)


class RequestLog(Observer):
    """Logs what each request asks, and with `outputs` its answer; `max_chars` characters of each, None: all."""

    def __init__(self, engine: AsyncEngine, outputs: bool, max_chars: int | None) -> None:
        self._engine = engine
        self._outputs = outputs
        self._max_chars = max_chars
        self._texts: dict[str, dict[int, str]] = {}

    def opened(self, key: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Log the prompt and the parameters that are not the defaults."""
        # No token is empty text in most vocabularies: so many tokens have at least so many characters.
        shown = self._engine.tokenizer.decode(prompt_token_ids[: self._max_chars], skip_special_tokens=False)
        request_logger.info(
            "%s (HTTP request %s): %d prompt tokens, %s, prompt %s",
            _name(key),
            http_request.get() or "none",
            len(prompt_token_ids),
            _asked(params),
            self._short(shown),
        )
        if self._outputs:
            self._texts[key] = {}

    def gained(self, key: str, delta: Delta) -> None:
        """Keep the text."""
        texts = self._texts.get(key)
        if texts is not None:
            texts[delta.index] = texts.get(delta.index, "") + delta.text

    def closed(self, key: str) -> None:
        """Log the texts."""
        for index, text in sorted(self._texts.pop(key, {}).items()):
            request_logger.info("%s choice %d: %s", _name(key), index, self._short(text))

    def _short(self, text: str) -> str:
        # ascii() keeps line ends and escape sequences of a prompt out of the log
        return ascii(text[: self._max_chars]) + (
            "..." if self._max_chars is not None and len(text) > self._max_chars else ""
        )


def _name(key: str) -> str:
    return ascii(key.rpartition("#")[0])[1:-1]


def _asked(params: SamplingParams) -> str:
    defaults = SamplingParams()
    names = [field.name for field in dataclasses.fields(params)]
    given = [name for name in names if getattr(params, name) != getattr(defaults, name)]
    return ascii({name: getattr(params, name) for name in given})


def log_requests(app: FastAPI, settings: ServerSettings, engine: AsyncEngine) -> Observer | None:
    """Give requests their ids and log them as the settings say. Returns an observer for the engine, if any."""
    app.add_middleware(
        RequestIds,
        tell=settings.enable_request_id_headers,
        quiet_routes=settings.disable_access_log_for_endpoints,
    )
    if not settings.enable_log_requests:
        return None
    return RequestLog(engine, settings.enable_log_outputs, settings.max_log_len)
