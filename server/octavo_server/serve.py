"""`octavo serve`: the engine in a process of its own, the API in this one."""

import argparse
import asyncio
import contextlib
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Generator

import uvicorn
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.config_args import add_arguments, add_engine_arguments, engine_config, resolve
from octavo.errors import ConfigError, OctavoError

from octavo_server.app import create_app
from octavo_server.settings import ServerSettings

_BACKLOG = 2048
_ANSWER_SECONDS = 5.0
"""What answers may take to be sent once the engine has ended."""


class ServeCommand:
    """The command `octavo serve`."""

    help = "Serve a model over OpenAI's HTTP API. The port opens at once; /health tells when the model is ready."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's flags and the server's."""
        add_engine_arguments(parser)
        add_arguments(parser.add_argument_group("server"), ServerSettings)

    def run(self, args: argparse.Namespace) -> int:
        """Serve until SIGTERM or SIGINT. Raises ConfigError for a bad flag, and what `serve` raises."""
        config = engine_config(args, [ServerSettings])
        settings = resolve(ServerSettings, args, [EngineConfig])
        return asyncio.run(serve(AsyncEngine(config, progress=_say), settings))


class _Server(uvicorn.Server):
    """uvicorn, ended by SIGTERM and SIGINT as usual, but with an exit status rather than by the signal itself.

    Requests that still run `--shutdown-timeout` seconds after the signal end with an error.
    """

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        level = settings.uvicorn_log_level
        config = uvicorn.Config(
            create_app(engine, settings.served_model_name, created=int(time.time())),
            lifespan="off",
            log_level=level,
            access_log=level in ("info", "debug", "trace"),
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout + _ANSWER_SECONDS),
            server_header=False,
        )
        super().__init__(config)
        self._engine = engine
        self._patience = settings.shutdown_timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait for the requests that run."""
        end = asyncio.create_task(self._end_requests())
        await super().shutdown(sockets)
        end.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._patience)
        await self._engine.shutdown("The server is shutting down.")

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle the signals while the server runs."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def serve(engine: AsyncEngine, settings: ServerSettings) -> int:
    """Open the port, start the engine, serve until a signal. Raises why the engine did not start, or ended before."""
    with _listen(settings.host, settings.port) as listener:
        server = _Server(engine, settings)
        watch = asyncio.create_task(_watch(engine, server, listener.getsockname()))
        try:
            await server.serve(sockets=[listener])
        finally:
            await engine.shutdown()
        error = await watch
    if error is not None:
        raise error
    return 0


async def _watch(engine: AsyncEngine, server: _Server, address: tuple[str, int]) -> OctavoError | None:
    """Start the engine, say so, and end the server when the engine ends; returns why, unless the server ended it."""
    begin = time.monotonic()
    try:
        await engine.launch()
        _say(_welcome(engine, address, time.monotonic() - begin))
        error = await engine.wait_dead()
    except OctavoError as failure:
        error = failure
    finally:
        asked, server.should_exit = server.should_exit, True
    return None if asked else error


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"The server cannot listen on {host}:{port}: {reason}. Choose another --host or --port."
        ) from error


def _welcome(engine: AsyncEngine, address: tuple[str, int], seconds: float) -> str:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{host}:{address[1]}"
    body = {"messages": [{"role": "user", "content": "Name the capital of France."}], "temperature": 0}
    info = engine.info
    return (
        f"{info.model} ({info.dtype}, {info.device}), context {info.max_model_len} tokens, "
        f"KV cache {info.num_blocks * info.block_size} tokens.\n"
        f"Ready after {seconds:.1f} s at {url}. Try it:\n\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
