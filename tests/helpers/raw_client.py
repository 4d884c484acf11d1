"""A client that costs its machine little: it notes when bytes come, and reads them once all is over.

On a machine of few cores a client that parses each event as it comes slows down the very server that it measures.
"""

import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Timed:
    """A streamed completion: its text, and when each event with text came, in seconds from when it was asked for."""

    text: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        """Seconds between events."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def complete_all(url: str, bodies: Sequence[dict[str, Any]]) -> list[Timed]:
    """Stream completions, all together; greedy and to their full length unless a body says otherwise.

    Raises OSError with the answer of a server that refuses.
    """
    begin = time.perf_counter()
    pieces: list[list[tuple[float, bytes]]] = [[] for _ in bodies]
    with selectors.DefaultSelector() as selector:
        for number, body in enumerate(bodies):
            selector.register(_ask(url, body), selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _ in selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if piece := key.fileobj.recv(1 << 16):
                    pieces[key.data].append((time.perf_counter() - begin, piece))
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
    return [_read(one) for one in pieces]


def _ask(url: str, body: dict[str, Any]) -> socket.socket:
    place = urlsplit(url)
    content = json.dumps({"temperature": 0.0, "ignore_eos": True, "stream": True, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((place.hostname, place.port))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    return connection


def _read(pieces: list[tuple[float, bytes]]) -> Timed:
    result, left = Timed(), b""
    if not pieces or b" 200 " not in pieces[0][1].split(b"\r\n")[0]:
        raise OSError(b"".join(piece for _, piece in pieces).decode(errors="replace")[:500])
    for when, piece in pieces:
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise OSError(event["error"]["message"])
                result.text += event["choices"][0]["text"]
                result.times.append(when)
    return result
