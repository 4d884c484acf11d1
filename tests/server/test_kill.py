"""kill -9 of the engine process and of the server under load: everything ends, and nothing is left."""

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from servers import READY, ServerProcess, fake_command, spawned, until_gone

pytestmark = pytest.mark.usefixtures("helpers_in_child")
STREAMS = 8
LOAD = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True, "stream": True}


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the processes would put files and sockets."""
    with tempfile.TemporaryDirectory(prefix="o") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


class Load:
    """Streams that run until they are cut off, `tokens` long so far."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=30)
        self.texts = [""] * STREAMS
        self.tasks = [asyncio.create_task(self._stream(number)) for number in range(STREAMS)]

    async def _stream(self, number: int) -> str:
        try:
            while True:
                async with self._client.stream("POST", "/v1/completions", json=LOAD) as response:
                    if response.status_code != 200:
                        return (await response.aread()).decode()
                    async for line in response.aiter_lines():
                        if '"error"' in line:
                            return line
                        self.texts[number] += line
        except httpx.HTTPError as error:
            return type(error).__name__

    async def until_all_stream(self) -> None:
        """Wait until each has had something."""
        async with asyncio.timeout(30):
            while not all(self.texts):
                await asyncio.sleep(0.01)

    async def ended(self) -> list[str]:
        """How each ended, for 5 s at most."""
        async with asyncio.timeout(5):
            ends = await asyncio.gather(*self.tasks)
        await self._client.aclose()
        return ends


def _left(directory: Path, *pids: int) -> list[str]:
    """Files, listening Unix sockets and shared memory that the processes have left."""
    sockets = [line for line in Path("/proc/net/unix").read_text().splitlines() if str(directory) in line]
    shared = [name for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in pids)]
    return [*os.listdir(directory), *sockets, *shared]


async def _under_load(server: ServerProcess, start_seconds: float) -> tuple[Load, int]:
    load = Load(await server.said(READY, start_seconds))
    await load.until_all_stream()
    return load, await server.engine_pid()


async def _kill_engine(command: Sequence[str], temporary: Path, start_seconds: float = 10.0) -> None:
    async with spawned(command) as server:
        load, engine = await _under_load(server, start_seconds)
        begin = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        ends = await load.ended()
        await server.said(r"octavo: (The engine process ended unexpectedly \(signal 9\))")
        assert await asyncio.wait_for(server.process.wait(), 10) == 1
        assert time.monotonic() - begin < 10
        # A stream that was between two requests may find the door closed already.
        assert sum("signal 9" in end for end in ends) >= STREAMS // 2, ends
        assert _left(temporary, server.process.pid, engine) == []


async def _kill_server(command: Sequence[str], temporary: Path, start_seconds: float = 10.0) -> None:
    async with spawned(command) as server:
        load, engine = await _under_load(server, start_seconds)
        server.process.kill()
        await load.ended()
        await until_gone(engine)
        assert _left(temporary, server.process.pid, engine) == []


@pytest.mark.parametrize("kill", [_kill_engine, _kill_server])
async def test_kill_under_load_leaves_nothing(kill: "type", tmp_path: Path, temporary: Path) -> None:
    for _ in range(3):
        await kill(fake_command(tmp_path, "start_slow"), temporary)


async def test_kill_during_the_start_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    for delay in (0.3, 0.8, 1.5):
        async with spawned(fake_command(tmp_path, "start_late")) as server:
            await asyncio.sleep(delay)
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
            server.process.kill()
            await server.process.wait()
            for pid in map(int, children):
                await until_gone(pid)
            assert _left(temporary, server.process.pid, *map(int, children)) == []


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("kill", [_kill_engine, _kill_server])
async def test_kill_of_the_default_model_leaves_nothing(kill: "type", temporary: Path) -> None:
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0", "--no-progress"]
    for _ in range(20):
        await kill(command, temporary, 120.0)
