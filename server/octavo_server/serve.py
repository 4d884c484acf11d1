"""`octavo serve`: the engine in a process of its own, the API in this one."""

import argparse
import asyncio
import contextlib
import math
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
import uvloop
from fastapi import FastAPI
from octavo.async_engine import AsyncEngine
from octavo.config_args import add_arguments, add_engine_arguments, engine_config, resolve
from octavo.errors import ConfigError, OctavoError
from octavo.garbage import spare_garbage_collection
from octavo.request_stream import Observers

from octavo_server.api_settings import ApiSettings
from octavo_server.app import create_app
from octavo_server.flags import ALL_SETTINGS, add_foreign_arguments, complete
from octavo_server.limits import limit
from octavo_server.security import allow_origins, certificate_times, guard, read_keys, tls_options
from octavo_server.settings import ServerSettings
from octavo_server.streaming import cancel
from octavo_server.tracing import trace
from octavo_server.tracing_log import configure_logging, log_requests
from octavo_server.turns import take_turns
from octavo_server.watchdog import watch_steps
from octavo_server.welcome import welcome

_BACKLOG = 2048
_ANSWER_SECONDS = 5.0
"""What answers may take to be sent once the engine has ended."""

_REFRESH_SECONDS = 5.0
_SWITCH_SECONDS = 0.001
"""How long a thread that reads a large body may keep the interpreter from the event loop (Python's own: 5 ms)."""


class ServeCommand:
    """The command `octavo serve`."""

    help = "Serve a model over OpenAI's HTTP API. The port opens at once; /health tells when the model is ready."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the engine's flags, the server's and the API's."""
        add_engine_arguments(parser)
        add_arguments(parser.add_argument_group("server"), ServerSettings)
        add_arguments(parser.add_argument_group("API"), ApiSettings)
        add_foreign_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Serve until SIGTERM or SIGINT. Raises ConfigError for a bad flag, and what `serve` raises."""
        args = complete(args)
        config = engine_config(args, ALL_SETTINGS)
        settings = resolve(ServerSettings, args, ALL_SETTINGS)
        api = resolve(ApiSettings, args, ALL_SETTINGS)
        configure_logging(settings)
        sys.setswitchinterval(_SWITCH_SECONDS)
        return uvloop.run(serve(AsyncEngine(config, progress=_say), settings, api))


def build_app(
    engine: AsyncEngine, settings: ServerSettings, api: ApiSettings | None = None, keys: Sequence[str] = ()
) -> FastAPI:
    """The API with everything before it: ids and logs first, then origins, keys, limits. Raises ConfigError."""
    app = create_app(
        engine,
        settings.served_model_name,
        created=int(time.time()),
        settings=api,
        isolate_cache_by_key=settings.isolate_cache_by_key,
    )
    # The middleware added last sees a request first.
    take_turns(app)
    observers = [limit(app, settings, engine)]
    guard(app, settings, keys)
    allow_origins(app, settings)
    observers += [trace(app, settings.otlp_traces_endpoint, engine), log_requests(app, settings, engine)]
    engine.observer = Observers(engine.observer, *(one for one in observers if one is not None))
    app.root_path = settings.root_path
    return app


class _Server(uvicorn.Server):
    """uvicorn, ended by SIGTERM and SIGINT as usual, but with an exit status rather than by the signal itself.

    Requests that still run `--shutdown-timeout` seconds after the signal end with an error.
    """

    def __init__(self, engine: AsyncEngine, app: FastAPI, settings: ServerSettings) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            http="h11",  # httptools puts no end to headers, and loses bodies of clients that offer HTTP/2
            ws="none",
            log_level=settings.uvicorn_log_level,
            access_log=False,  # ours has the requests' ids
            timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout + _ANSWER_SECONDS),
            server_header=False,
            **tls_options(settings),
        )
        super().__init__(config)
        self._engine = engine
        self._patience = settings.shutdown_timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait for the requests that run."""
        if self._engine.dead is not None:  # they have ended; a client that does not read its answer holds up nobody
            self.config.timeout_graceful_shutdown = math.ceil(_ANSWER_SECONDS)
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


async def serve(engine: AsyncEngine, settings: ServerSettings, api: ApiSettings | None = None) -> int:
    """Open the port, start the engine, serve until a signal. Raises why the engine did not start, or ended before."""
    keys = read_keys(settings)
    server = _Server(engine, build_app(engine, settings, api, keys), settings)
    with _listening(settings) as listener:
        watch = asyncio.create_task(_watch(engine, server, listener, settings, bool(keys)))
        helpers = [asyncio.create_task(watch_steps(engine, settings.engine_timeout))]
        if settings.enable_ssl_refresh:
            helpers.append(asyncio.create_task(_refresh_certificate(server, settings)))
        try:
            await server.serve(sockets=[listener])
        finally:
            await cancel(helpers)
            await engine.shutdown()
        error = await watch
    if error is not None:
        raise error
    return 0


async def _watch(
    engine: AsyncEngine, server: _Server, listener: socket.socket, settings: ServerSettings, guarded: bool
) -> OctavoError | None:
    """Start the engine, say so, and end the server when the engine ends; returns why, unless the server ended it."""
    begin = time.monotonic()
    try:
        await engine.launch()
        spare_garbage_collection(5_000, 10, 10)  # under malformed requests an engine's numbers take 2% more memory
        if not server.should_exit:
            _say(welcome(engine.info, listener, settings, time.monotonic() - begin, guarded=guarded))
        error = await engine.wait_dead()
    except OctavoError as failure:
        error = failure
    finally:
        asked, server.should_exit = server.should_exit, True
    return None if asked else error


async def _refresh_certificate(server: _Server, settings: ServerSettings) -> None:
    """Load the certificate again whenever its files change; new connections then get the new one."""
    seen = certificate_times(settings)
    while True:
        await asyncio.sleep(_REFRESH_SECONDS)
        found = certificate_times(settings)
        if found == seen or server.config.ssl is None or settings.ssl_certfile is None:
            continue
        try:
            server.config.ssl.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
            seen = found
            _say("The TLS certificate was loaded again.")
        except OSError as error:  # half written, perhaps: it is tried again
            _say(f"Warning: the TLS certificate could not be loaded again: {error.strerror or error}.")


@contextmanager
def _listening(settings: ServerSettings) -> Iterator[socket.socket]:
    """The socket that the settings ask for; a Unix socket's file is gone afterwards."""
    if settings.uds is None:
        with _listen(settings.host, settings.port) as listener:
            yield listener
        return
    with _listen_unix(settings.uds) as listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(settings.uds)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError when the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        # Connections inherit it. asyncio sets it on sockets of its own making only; without it each answer waits 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"The server cannot listen on {host}:{port}: {reason}. Choose another --host or --port."
        ) from error


def _listen_unix(path: str) -> socket.socket:
    """A listening Unix socket. Raises ConfigError when the path cannot be had."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"The server cannot listen on {path}: {error.strerror or error}. Choose another --uds."
        ) from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove the socket file that a killed server has left; a file of another kind, or with a server, stays."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
