"""The link to the engine process: frames of any size arrive whole and in order, however slowly they are read."""

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop
from octavo import engine_link
from octavo.engine_link import EngineLink


def frames() -> list[bytes]:
    """Mostly small ones; some are larger than a socket takes at once."""
    generator = random.Random(0)
    sizes = [generator.choice([5_000, 200_000, 1_000_000]) if i % 20 == 0 else i % 3_000 + 1 for i in range(600)]
    return [generator.randbytes(size) for size in sizes]


def read_slowly(connection: socket.socket, received: bytearray) -> None:
    while data := connection.recv(1 << 16):
        received += data
        if len(received) % 7 == 0:
            time.sleep(0.001)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_frames_arrive_whole_and_in_order(
    run: Callable[[Coroutine[Any, Any, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_link, "encode", lambda frame: frame)
    sent, received = frames(), bytearray()
    ours, theirs = socket.socketpair()
    reading = threading.Thread(target=read_slowly, args=(theirs, received))

    async def send_all() -> None:
        link = EngineLink(None, ours, *await asyncio.open_unix_connection(sock=ours))  # type: ignore[arg-type]
        for i, frame in enumerate(sent):
            link.send(frame)  # type: ignore[arg-type]
            if i % 3 == 0:
                await asyncio.sleep(0)
        link._writer.close()
        await link._writer.wait_closed()

    reading.start()
    run(send_all())
    reading.join(10)
    theirs.close()
    assert received == b"".join(sent)


async def test_a_message_is_sent_before_the_event_loop_comes_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_link, "encode", lambda frame: frame)
    ours, theirs = socket.socketpair()
    with theirs:
        link = EngineLink(None, ours, *await asyncio.open_unix_connection(sock=ours))  # type: ignore[arg-type]
        link.send(b"now")  # type: ignore[arg-type]
        assert theirs.recv(10, socket.MSG_DONTWAIT) == b"now"
        link._writer.close()
        await link._writer.wait_closed()
