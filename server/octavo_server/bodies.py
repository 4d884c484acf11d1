"""Large bodies, read without holding up the event loop.

A thread alone does not help: one that parses JSON in a single call keeps the interpreter until it is done. So it parses
in pieces, between which other threads get their turn.
"""

import asyncio
import contextvars
import json
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from octavo.errors import OctavoError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

LARGE_BYTES = 64 << 10
"""Bodies from this size on are read in a thread, one after the other; smaller ones take less than a millisecond."""

_PIECE_BYTES = 64 << 10
_DEPTH = 5
"""Levels that are taken apart: body, messages, message, content, part. Each costs a pass over the text."""

_thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-body")


class BodyRoute(APIRoute):
    """A route whose large bodies are parsed and validated off the event loop."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, for requests that read their bodies so."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        model = self.body_field.field_info.annotation

        async def handle_body(request: Request) -> Response:
            try:
                return await handle(_BodyRequest(request, model))
            except HTTPException as error:
                if isinstance(error.__cause__, OctavoError | RequestValidationError):
                    raise error.__cause__ from None  # FastAPI takes it for a fault of the parser
                raise

        return handle_body


class _BodyRequest(Request):
    """A request whose JSON, if it is large, is a finished model, which FastAPI then takes as it is."""

    def __init__(self, request: Request, model: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._model = model

    async def json(self) -> Any:
        """The body's JSON. Raises JSONDecodeError, and for a large body what its validation raises."""
        body = await self.body()
        if len(body) < LARGE_BYTES:
            return await super().json()
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(_thread, context.run, _read, body, self._model)


def _read(body: bytes, model: type[BaseModel]) -> BaseModel:
    try:
        return model.model_validate(parse(body))
    except ValidationError as error:
        details = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(details) from None


def parse(body: bytes) -> Any:
    """What `json.loads` makes of a body, a piece at a time. Raises JSONDecodeError, for NaN too: JSON has none."""
    try:
        return _parse(body, _DEPTH)
    except (msgspec.DecodeError, RecursionError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


def _parse(data: bytes, depth: int) -> Any:
    start = data.lstrip()[:1]
    if depth == 0 or len(data) < _PIECE_BYTES or start not in (b"{", b"["):
        return msgspec.json.decode(data)
    if start == b"{":
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return {name: _parse(bytes(value), depth - 1) for name, value in fields.items()}
    if _is_flat(data):
        return [item for piece in _pieces(data.strip()) for item in msgspec.json.decode(piece)]
    return [_parse(bytes(item), depth - 1) for item in msgspec.json.decode(data, type=list[msgspec.Raw])]


def _is_flat(array: bytes) -> bool:
    """Whether a JSON array holds nothing but numbers, true, false and null, so that it can be cut at any comma."""
    closed = array.rstrip().endswith(b"]") and array.count(b"[") == array.count(b"]") == 1
    return closed and b"{" not in array and b'"' not in array


def _pieces(array: bytes) -> Iterator[bytes]:
    """A flat array as several smaller ones."""
    start, end = 1, len(array) - 1
    while (cut := array.find(b",", start + _PIECE_BYTES, end)) >= 0:
        yield b"[%b]" % array[start:cut]
        start = cut + 1
    yield b"[%b]" % array[start:end]
