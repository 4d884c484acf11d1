"""An engine that makes no step: its requests end, and so does the server; a slow one is left alone."""

import asyncio
import os
import signal
import time
from pathlib import Path

import fake_engine
import httpx
import pytest
from servers import FOREVER, READY, alive, server_process, start_request, until_gone

pytestmark = pytest.mark.usefixtures("helpers_in_child")
REASON = r"octavo: (The engine made no step for 0.5 s while requests ran \(--engine-timeout\))"


async def test_engine_that_hangs_ends_every_request_and_the_server(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_slow", engine_timeout=0.5) as server:
        url = await server.said(READY)
        engine = await server.engine_pid()
        streamed = await start_request(url)
        begin = time.monotonic()
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            hung = await client.post("/v1/completions", json={"prompt": [1, fake_engine.HANG]})
        assert hung.status_code == 503 and hung.json()["error"]["code"] == "engine_dead"
        assert "made no step for 0.5 s" in hung.text
        assert "made no step" in await streamed
        await server.said(REASON)
        assert await asyncio.wait_for(server.process.wait(), 5) == 1
        assert time.monotonic() - begin < 5.5
        await until_gone(engine)


async def test_stopped_engine_is_ended(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_slow", engine_timeout=0.5) as server:
        url = await server.said(READY)
        engine = await server.engine_pid()
        request = await start_request(url)
        os.kill(engine, signal.SIGSTOP)
        assert "made no step" in await request
        await server.said(REASON)
        assert await server.process.wait() == 1
        await until_gone(engine)


async def test_engine_that_turns_without_a_step_is_ended(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_full", engine_timeout=0.5) as server:
        url = await server.said(READY)
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            answer = await client.post("/v1/completions", json=FOREVER)
        assert answer.status_code == 503 and "made no step" in answer.text
        await server.said(REASON)
        assert await server.process.wait() == 1


async def test_idle_and_slow_engines_are_left_alone(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_slow", engine_timeout=0.4) as server:
        url = await server.said(READY)
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            for _ in range(2):
                answer = await client.post("/v1/completions", json=FOREVER)  # runs for 1.2 s
                assert answer.status_code == 200
                await asyncio.sleep(0.8)
            assert (await client.get("/health")).status_code == 200


async def test_engine_that_holds_the_interpreter_ends_with_a_killed_server(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start") as server:
        url = await server.said(READY)
        engine = await server.engine_pid()
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            hung = asyncio.create_task(client.post("/v1/completions", json={"prompt": [1, fake_engine.HANG]}))
            await asyncio.sleep(0.3)
            assert alive(engine)
            server.process.kill()
            with pytest.raises(httpx.HTTPError):
                await hung
        await until_gone(engine)


async def test_half_a_request_does_not_keep_a_server_whose_engine_died(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start") as server:
        url = await server.said(READY)
        _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await asyncio.sleep(0.2)
        os.kill(await server.engine_pid(), signal.SIGKILL)
        assert await asyncio.wait_for(server.process.wait(), 8) == 1
        writer.close()
