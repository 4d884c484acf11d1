"""HTTP/1.1 over asyncio streams, as much as a benchmark needs: a GET, and a POST answered by server-sent events."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from octavo.errors import ConfigError, OctavoError

_AT_ONCE = 1 << 16
_PORTS = {"http": 80, "https": 443}


class HTTPError(OctavoError):
    """An answer that is not 200, or that breaks off."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: `path` is what comes before /v1."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> "Address":
        """The address in `http://HOST[:PORT][/PATH][/v1]`. Raises ConfigError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--base-url is {url!r}, which is no URL: {error}.") from error
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ConfigError(f"--base-url is {url!r}, but must be such as http://127.0.0.1:8000.")
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], path)


class Chunks:
    """Takes a body's bytes apart that come in HTTP's chunked coding (RFC 9112, §7.1), in pieces of any size."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._left = 0  # bytes of the current chunk that are still to come, its CRLF included
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """What `data` adds to the body."""
        self._buffer += data
        body = bytearray()
        while not self.ended and (self._left or self._take_size()):
            taken = self._buffer[: self._left]
            del self._buffer[: self._left]
            body += taken[: max(0, self._left - 2)]
            self._left -= len(taken)
            if not self._buffer:
                break
        return bytes(body)

    def _take_size(self) -> bool:
        """Read the next chunk's size, if its line is there."""
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        size = int(bytes(self._buffer[:end]).partition(b";")[0], 16)
        del self._buffer[: end + 2]
        self.ended = size == 0
        self._left = size + 2
        return True


class Events:
    """Takes server-sent events apart that come in pieces of any size; gives the data of each."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The data of each line that `data` completes; an event of several lines does not occur here."""
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        for line in lines:
            if line.startswith(b"data:"):
                yield bytes(line[5:]).strip()


@dataclass(slots=True)
class Answer:
    """An answer whose body is still to come."""

    status: int
    headers: Mapping[str, str]
    _reader: asyncio.StreamReader
    _chunks: Chunks | None = field(init=False)
    _left: int | None = field(init=False)

    def __post_init__(self) -> None:
        chunked = "chunked" in self.headers.get("transfer-encoding", "").lower()
        self._chunks = Chunks() if chunked else None
        length = self.headers.get("content-length")
        self._left = int(length) if length is not None and not chunked else None

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises HTTPError when it breaks off."""
        while not self._over():
            data = await self._reader.read(_AT_ONCE)
            if not data:
                if self._chunks is not None or self._left is not None:
                    raise HTTPError("The server closed the connection in the middle of an answer.")
                return
            if self._left is not None:
                self._left -= len(data)
            yield data if self._chunks is None else self._chunks.feed(data)

    def _over(self) -> bool:
        return self._chunks.ended if self._chunks is not None else self._left is not None and self._left <= 0

    async def body(self) -> bytes:
        """All of the body."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of each server-sent event. Raises HTTPError for another status than 200."""
        if self.status != 200:
            text = (await self.body()).decode(errors="replace").strip()
            raise HTTPError(f"The server answered {self.status}: {text[:300]}")
        events = Events()
        async for piece in self.pieces():
            for data in events.feed(piece):
                yield data


@asynccontextmanager
async def request(
    address: Address, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> AsyncIterator[Answer]:
    """Send a request on a connection of its own, closed at the end. Raises HTTPError where nothing HTTP answers."""
    context = ssl.create_default_context() if address.scheme == "https" else None
    reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=1 << 20)
    try:
        lines = {
            "Host": f"{address.host}:{address.port}",
            "Connection": "close",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"{method} {address.path}{path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await writer.drain()
        yield await _answer(reader)
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> Answer:
    """Read the status and the headers."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise HTTPError("The server closed the connection without an answer.") from error
    status, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    words = status.split()
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
        raise HTTPError(f"The server answered {status[:80]!r}, which is not HTTP/1.1.")
    headers = (line.partition(":") for line in lines)
    return Answer(int(words[1]), {name.strip().lower(): value.strip() for name, _, value in headers}, reader)
