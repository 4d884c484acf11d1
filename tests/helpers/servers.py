"""A server over an engine without a model, in a process of its own or in the test's event loop."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.text.tokenizer import Tokenizer
from octavo_server.serve import _listening, _Server, build_app
from octavo_server.settings import ServerSettings
from tiny_tokenizer import write_tokenizer

FOREVER = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True}
READY = r"Ready after .* at (http\S+)\."


@dataclass
class ServerProcess:
    """A server in a process of its own, and what it said."""

    process: asyncio.subprocess.Process

    async def said(self, pattern: str, seconds: float = 10.0) -> str:
        """Wait for a line that matches, and return the match's first group."""
        assert self.process.stderr is not None
        lines = ""
        async with asyncio.timeout(seconds):
            while line := (await self.process.stderr.readline()).decode():
                if (found := re.search(pattern, line)) is not None:
                    return found[1]
                lines += line
        raise AssertionError(f"The server never said {pattern}, but:\n{lines}")

    async def engine_pid(self) -> int:
        """The process id of its engine, its only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = map(int, children)
        return pid


def fake_command(directory: Path, factory: str, **settings: Any) -> list[str]:
    """The command that serves `factory` of fake_engine with these ServerSettings; files go into `directory`."""
    script = Path(__file__).with_name("serve_fake.py")
    return [sys.executable, str(script), str(write_tokenizer(directory)), factory, json.dumps(settings)]


@asynccontextmanager
async def spawned(command: Sequence[str]) -> AsyncIterator[ServerProcess]:
    """A server that a command starts, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        yield ServerProcess(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def server_process(directory: Path, factory: str, **settings: Any) -> AsyncIterator[ServerProcess]:
    """A server that runs `factory` of fake_engine; `settings` are ServerSettings'."""
    async with spawned(fake_command(directory, factory, **settings)) as server:
        yield server


def alive(pid: int) -> bool:
    """Whether there is such a process; one that has ended and only waits to be reaped does not count."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def until_gone(pid: int) -> None:
    """Wait until there is no such process, for 5 s at most."""
    async with asyncio.timeout(5):
        while alive(pid):
            await asyncio.sleep(0.01)


async def start_request(url: str) -> "asyncio.Task[str]":
    """The lines of a stream that runs for 1.2 s, once its first token is there."""
    started = asyncio.Event()

    async def post() -> str:
        lines = ""
        async with (
            httpx.AsyncClient(base_url=url, timeout=10) as client,
            client.stream("POST", "/v1/completions", json={**FOREVER, "stream": True}) as response,
        ):
            async for line in response.aiter_lines():
                lines += line
                started.set()
        return lines

    task = asyncio.create_task(post())
    await started.wait()
    return task


@dataclass
class Live:
    """A server in the test's event loop, and a client for it. `url` is empty where it listens on a Unix socket."""

    engine: AsyncEngine
    client: httpx.AsyncClient
    url: str


@asynccontextmanager
async def live_server(
    tokenizer: Tokenizer, settings: ServerSettings, factory: str = "start", keys: Sequence[str] = (), **client: Any
) -> AsyncIterator[Live]:
    """A server with an engine that is ready; `client` are httpx's arguments."""
    engine = await AsyncEngine.start(EngineConfig(), factory=f"fake_engine:{factory}", tokenizer=tokenizer)
    server = _Server(engine, build_app(engine, settings, None, keys), settings)
    try:
        with _listening(settings) as listener:
            task = asyncio.create_task(server.serve(sockets=[listener]))
            url = "" if settings.uds else f"{settings.scheme}://127.0.0.1:{listener.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url or "http://localhost", timeout=10, **client) as one:
                yield Live(engine, one, url)
            server.should_exit = True
            await task
    finally:
        await engine.shutdown()
