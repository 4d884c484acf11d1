"""`octavo serve`: the engine in a process of its own, the API in this one."""

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import Generator

import uvicorn
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.config_args import add_arguments, add_engine_arguments, engine_config, resolve
from octavo.errors import ConfigError

from octavo_server.app import create_app
from octavo_server.settings import ServerSettings

_BACKLOG = 2048


class ServeCommand:
    """The command `octavo serve`."""

    help = "Serve a model over OpenAI's HTTP API. The port opens at once; /health tells when the model is ready."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's flags and the server's."""
        add_engine_arguments(parser)
        add_arguments(parser.add_argument_group("server"), ServerSettings)

    def run(self, args: argparse.Namespace) -> int:
        """Serve until SIGTERM or SIGINT. Raises what the engine's start raised; 1 when the engine died later."""
        config = engine_config(args, [ServerSettings])
        settings = resolve(ServerSettings, args, [EngineConfig])
        return asyncio.run(serve(config, settings))


class _Server(uvicorn.Server):
    """uvicorn, ended by SIGTERM and SIGINT as usual, but with an exit status rather than by the signal itself."""

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


async def serve(config: EngineConfig, settings: ServerSettings) -> int:
    """Run engine and API until a signal or the engine's end; returns the exit status."""
    begin = time.monotonic()
    with _listen(settings.host, settings.port) as listener:
        engine = AsyncEngine(config, progress=_say)
        server = _Server(
            uvicorn.Config(
                create_app(engine, settings.served_model_name, created=int(time.time())),
                lifespan="off",
                log_level=settings.uvicorn_log_level,
                access_log=settings.uvicorn_log_level in ("info", "debug", "trace"),
                timeout_graceful_shutdown=int(settings.shutdown_timeout),
                server_header=False,
            )
        )
        watch = asyncio.create_task(_watch(engine, server, listener.getsockname(), begin))
        try:
            await server.serve(sockets=[listener])
        finally:
            died = engine.dead is not None
            await engine.shutdown()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
    if not watch.cancelled() and (error := watch.exception()) is not None:
        raise error
    return 1 if died else 0


async def _watch(engine: AsyncEngine, server: uvicorn.Server, address: tuple[str, int], begin: float) -> None:
    """Start the engine, say so, and end the server when the engine ends."""
    try:
        await engine.launch()
        _say(_welcome(engine, address, time.monotonic() - begin))
        await engine.wait_dead()
    finally:
        server.should_exit = True


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
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    info = engine.info
    return (
        f"{info.model} ({info.dtype}, {info.device}), context {info.max_model_len} tokens, "
        f"KV cache {info.num_blocks * info.block_size} tokens.\n"
        f"Ready after {seconds:.1f} s at {url}. Try it:\n\n"
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
