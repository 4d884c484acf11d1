"""What crosses the process boundary: typed messages in msgpack, each in a frame that starts with its length."""

import asyncio
from typing import BinaryIO

import msgspec

from octavo.admission import EngineInfo
from octavo.config import EngineConfig
from octavo.engine.step import EngineStats, TokenEvent
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 1 << 30


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message to the engine process: what to build. `factory` is "module:function"."""

    config: EngineConfig
    factory: str


class Add(msgspec.Struct, frozen=True, tag=True):
    """Queue a request."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request, or one choice of it; no event follows."""

    request_id: str
    choice: int | None = None


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for the engine's counters; answered under the same `call`."""

    call: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Ask to forget cached prefixes; answered under the same `call`."""

    call: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the engine process."""


class Phase(msgspec.Struct, frozen=True, tag=True):
    """How far the start is, in words."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start or go on. `kind` names a class of octavo.errors, or is empty."""

    kind: str
    message: str


class Events(msgspec.Struct, frozen=True, tag=True):
    """All events of a step; none is a sign of life.

    `started` maps requests that began to run to the seconds that they waited. `stats` come several times a second, and
    when the last request has ended.
    """

    events: list[TokenEvent]
    started: dict[str, float] = {}
    stats: EngineStats | None = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The engine did not take a request."""

    request_id: str
    message: str
    field: str | None = None


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The result of a call."""

    call: int
    result: EngineStats | bool


ToEngine = Start | Add | Abort | GetStats | ResetPrefixCache | Stop
FromEngine = Phase | Ready | Failed | Events | Refused | Answer

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """The frame of a message: four bytes of length (big-endian), then msgpack."""
    body = _encoder.encode(message)
    _check_length(len(body))
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def read_command(stream: BinaryIO) -> ToEngine | None:
    """The next message to the engine from a blocking stream; None at its end. Raises EngineDeadError when it is cut."""
    header = stream.read(LENGTH_BYTES)
    if not header:
        return None
    length = _check_length(int.from_bytes(header, "big"))
    body = stream.read(length)
    if len(header) < LENGTH_BYTES or len(body) < length:
        raise EngineDeadError("The connection between server and engine ended in the middle of a message.")
    return _to_engine.decode(body)


async def read_news(stream: asyncio.StreamReader) -> FromEngine:
    """The next message from the engine. Raises asyncio.IncompleteReadError at the end of the stream."""
    length = _check_length(int.from_bytes(await stream.readexactly(LENGTH_BYTES), "big"))
    return _from_engine.decode(await stream.readexactly(length))


def _check_length(length: int) -> int:
    if length > MAX_FRAME_BYTES:
        raise EngineDeadError(f"A message between server and engine has {length} bytes, but at most {MAX_FRAME_BYTES}.")
    return length
