"""The engine's own process (`python -m octavo.engine_process FD PARENT`): commands in from a socket, events out."""

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from octavo import errors
from octavo.admission import EngineInfo
from octavo.engine.step import EngineStats
from octavo.garbage import spare_garbage_collection
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

STATS_SECONDS = 0.25
"""How often counters and gauges are sent while the engine works."""

GRACE_SECONDS = 2.0
"""How long the engine may take to end once the server is gone."""

_SEND_BUFFER_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


class EngineProcess:
    """Serves one engine to the process at the other end of a connected socket.

    A reader thread queues the commands; the calling thread owns the engine. When the socket closes the process ends,
    even in the middle of a start or a step: there is nobody left to work for.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._arrivals: dict[str, float] = {}
        self._stats = EngineStats()

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
        spare_garbage_collection()
        self._send(Ready(msgspec.convert(msgspec.to_builtins(info), EngineInfo)))
        return engine  # type: ignore[no-any-return]

    def _serve(self, engine: "Engine") -> None:
        last_sent = last_stats = time.monotonic()
        while self._obey(engine):
            begin = time.monotonic()
            events = engine.step()
            started = {name: begin - self._arrivals.pop(name, begin) for name in engine.started}
            now = time.monotonic()
            if now - last_stats > STATS_SECONDS:
                self._stats = engine.stats()
                self._send(Events(events, started, self._stats))
                last_sent = last_stats = now
            elif events or started or now - last_sent > HEARTBEAT_SECONDS:
                self._send(Events(events, started))
                last_sent = now

    def _obey(self, engine: "Engine") -> bool:
        """Do what is asked; wait for it only while the engine has no work. False at the end."""
        while True:
            if not engine.has_work():
                self._rest(engine)
            try:
                command = self._commands.get(block=not engine.has_work())
            except queue.Empty:
                return True
            if isinstance(command, Stop):
                return False
            self._do(engine, command)

    def _rest(self, engine: "Engine") -> None:
        """Nothing is left to do: say what it came to."""
        self._arrivals.clear()
        if (stats := engine.stats()) != self._stats:
            self._stats = stats
            self._send(Events([], stats=stats))

    def _do(self, engine: "Engine", command: ToEngine) -> None:
        match command:
            case Add():
                self._add(engine, command)
            case Abort(request_id, choice):
                engine.abort(request_id, choice)
                if choice is None:
                    self._arrivals.pop(request_id, None)
            case GetStats(call):
                self._send(Answer(call, engine.stats()))
            case ResetPrefixCache(call):
                self._send(Answer(call, engine.reset_prefix_cache()))

    def _add(self, engine: "Engine", new: Add) -> None:
        try:
            engine.add_request(
                new.request_id, new.prompt_token_ids, new.params, priority=new.priority, cache_salt=new.cache_salt
            )
            self._arrivals[new.request_id] = time.monotonic()
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
    """Serve an engine to the socket that the command line names by its number, for the parent that it names."""
    descriptor, parent = map(int, sys.argv[1:])
    _die_with(parent)
    with socket.socket(fileno=descriptor) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        return EngineProcess(connection).run()


def _die_with(parent: int) -> None:
    """Have the kernel end this process with its parent, even while a kernel that hangs holds the interpreter."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this was set
            sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
