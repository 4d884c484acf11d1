"""The server's end of the process boundary: starts the engine process, talks to it and reaps it."""

import asyncio
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Self

from octavo.errors import EngineDeadError
from octavo.wire import FromEngine, ToEngine, encode, read_news

_READ_BUFFER_BYTES = 1 << 20
_POLL_SECONDS = 0.02
_Call = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class EngineLink:
    """A running engine process and the socket to it. The process ends when the socket closes, whatever closes it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls) -> Self:
        """Start a process and wait for its call. Raises EngineDeadError when it ends before.

        It calls on a socket in a directory that only this user can enter; the directory is gone once the call is taken.
        """
        loop = asyncio.get_running_loop()
        call: asyncio.Future[_Call] = loop.create_future()
        directory = Path(tempfile.mkdtemp(prefix="octavo-"))
        try:
            path = directory / "engine.sock"
            server = await asyncio.start_unix_server(
                lambda reader, writer: call.set_result((reader, writer)), path, limit=_READ_BUFFER_BYTES
            )
            try:
                process = await _start(path, call)
            finally:
                server.close()
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return cls(process, *call.result())

    def send(self, message: ToEngine) -> None:
        """Hand a message to the engine; it is lost when the process has ended."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> FromEngine | None:
        """The next message from the engine; None when the process has ended."""
        try:
            return await read_news(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def close(self, patience: float) -> str:
        """Close the socket, wait `patience` seconds for the process to end, then kill it. Returns how it ended."""
        self._writer.close()
        return await _reap(self.process, patience)


async def _start(path: Path, call: "asyncio.Future[_Call]") -> "subprocess.Popen[bytes]":
    # A process group of its own: Ctrl-C in a terminal `timeout`'s SIGTERM reach only the server, which then drains.
    command = [sys.executable, "-P", "-m", "octavo.engine_process", str(path)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    try:
        while not call.done() and process.poll() is None:
            await asyncio.sleep(_POLL_SECONDS)
    except BaseException:
        await _reap(process, 0.0)
        raise
    if not call.done():
        raise EngineDeadError(f"The engine process ended before it called back ({_status(process.returncode)}).")
    return process


async def _reap(process: "subprocess.Popen[bytes]", patience: float) -> str:
    deadline = asyncio.get_running_loop().time() + patience
    while process.poll() is None:
        if asyncio.get_running_loop().time() >= deadline:
            process.kill()
            process.wait()
        else:
            await asyncio.sleep(_POLL_SECONDS)
    return _status(process.returncode)


def _status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit status {status}"
