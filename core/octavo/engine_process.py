"""The engine's own process (`python -m octavo.engine_process SOCKET`): commands in from a socket, events out."""

import logging
import os
import queue
import socket
import sys
import threading
import time
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from octavo import errors
from octavo.admission import EngineInfo
from octavo.wire import (
    Abort,
    Add,
    Answer,
    Events,
    Failed,
    FromEngine,
    GetStats,
    Phase,
    Ready,
    Refused,
    ResetPrefixCache,
    Start,
    Stop,
    ToEngine,
    encode,
    read_command,
)

if TYPE_CHECKING:
    from octavo.engine.loop import Engine

logger = logging.getLogger("octavo.engine_process")

HEARTBEAT_SECONDS = 1.0
"""Steps without events say so this often, so that the server can tell a slow engine from a stuck one."""

GRACE_SECONDS = 2.0
"""How long the engine may take to end once the server is gone."""

_SEND_BUFFER_BYTES = 1 << 20


class EngineProcess:
    """Serves one engine to the process at the other end of a connected socket.

    A reader thread queues the commands; the calling thread owns the engine. When the socket closes the process ends,
    even in the middle of a start or a step: there is nobody left to work for.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()

    def run(self) -> int:
        """Start the engine that the first command describes and serve it to the end. Returns the exit status."""
        threading.Thread(target=self._read, name="commands", daemon=True).start()
        start = self._commands.get()
        if not isinstance(start, Start):
            return 1
        engine = None
        try:
            engine = self._start(start)
            self._serve(engine)
            status = 0
        except (BrokenPipeError, ConnectionResetError):
            status = 1
        except Exception as error:
            status = self._report(error)  # before the engine is taken down, which may take a while
        if engine is not None:
            engine.shutdown()
        return status

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while (command := read_command(stream)) is not None:
                    self._commands.put(command)
        except OSError:
            pass  # the server was killed: the same as a closed socket
        finally:
            self._commands.put(Stop())
            time.sleep(GRACE_SECONDS)
            os._exit(1)

    def _send(self, message: FromEngine) -> None:
        self._connection.sendall(encode(message))

    def _start(self, start: Start) -> "Engine":
        module, _, function = start.factory.partition(":")
        factory = getattr(import_module(module), function)
        engine, info = factory(start.config, lambda text: self._send(Phase(text)))
        self._send(Ready(msgspec.convert(msgspec.to_builtins(info), EngineInfo)))
        return engine  # type: ignore[no-any-return]

    def _serve(self, engine: "Engine") -> None:
        last_sent = time.monotonic()
        while self._obey(engine):
            events = engine.step()
            now = time.monotonic()
            if events or now - last_sent > HEARTBEAT_SECONDS:
                self._send(Events(events))
                last_sent = now

    def _obey(self, engine: "Engine") -> bool:
        """Do what is asked; wait for it only while the engine has no work. False at the end."""
        while True:
            try:
                command = self._commands.get(block=not engine.has_work())
            except queue.Empty:
                return True
            if isinstance(command, Stop):
                return False
            self._do(engine, command)

    def _do(self, engine: "Engine", command: ToEngine) -> None:
        match command:
            case Add():
                self._add(engine, command)
            case Abort(request_id, choice):
                engine.abort(request_id, choice)
            case GetStats(call):
                self._send(Answer(call, engine.stats()))
            case ResetPrefixCache(call):
                self._send(Answer(call, engine.reset_prefix_cache()))

    def _add(self, engine: "Engine", new: Add) -> None:
        try:
            engine.add_request(
                new.request_id, new.prompt_token_ids, new.params, priority=new.priority, cache_salt=new.cache_salt
            )
        except errors.RequestError as error:
            self._send(Refused(new.request_id, str(error), error.field))

    def _report(self, error: Exception) -> int:
        kind = next((c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__), "")
        if kind:
            message = str(error)
        else:
            logger.exception("The engine process failed.")
            message = f"The engine process failed with {type(error).__name__}: {error}"
        self._send(Failed(kind, message))
        return 1


def main() -> int:
    """Connect to the socket that the command line names and serve an engine to it."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    connection.connect(sys.argv[1])
    with connection:
        return EngineProcess(connection).run()


if __name__ == "__main__":
    sys.exit(main())
