"""The server's end of the process boundary: starts the engine process, talks to it and reaps it."""

import asyncio
import os
import socket
import subprocess
import sys
from typing import Self

from octavo.wire import FromEngine, ToEngine, encode, read_news

_READ_BUFFER_BYTES = 1 << 20
_POLL_SECONDS = 0.02


class EngineLink:
    """A running engine process and the socket to it. The process ends when the socket closes, whatever closes it."""

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        connection: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.process = process
        self._connection = connection
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls) -> Self:
        """Start a process that has the other end of a socket pair, which has no name that others could find."""
        ours, theirs = socket.socketpair()
        with theirs:
            # A process group of its own: Ctrl-C in a terminal reaches only the server, which then drains.
            command = [sys.executable, "-P", "-m", "octavo.engine_process", str(theirs.fileno()), str(os.getpid())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], process_group=0)
        try:
            return cls(process, ours, *await asyncio.open_unix_connection(sock=ours, limit=_READ_BUFFER_BYTES))
        except BaseException:
            ours.close()
            await _reap(process, 0.0)
            raise

    def send(self, message: ToEngine) -> None:
        """Hand a message to the engine; it is lost when the process has ended."""
        if self._writer.is_closing():
            return
        frame = encode(message)
        if self._writer.transport.get_write_buffer_size() == 0:
            frame = frame[self._send_now(frame) :]
        if frame:
            self._writer.write(frame)

    def _send_now(self, frame: bytes) -> int:
        """Send what the socket takes, in bytes: an event loop may keep it until many other requests are read."""
        try:
            return self._connection.send(frame, socket.MSG_DONTWAIT)
        except OSError:  # full, or broken, which the writer will find out
            return 0

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

    def kill(self) -> None:
        """End the process at once."""
        if self.process.poll() is None:
            self.process.kill()


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
