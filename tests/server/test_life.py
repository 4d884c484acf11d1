"""Start, disconnects, death and shutdown of the server."""

import asyncio
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from octavo.errors import EngineDeadError
from servers import FOREVER, READY, server_process, start_request, until_gone

pytestmark = pytest.mark.usefixtures("helpers_in_child")


async def _running(service: Any) -> int:
    running: int = (await service.engine.stats()).num_running
    return running


async def _until_running(service: Any, number: int) -> None:
    async with asyncio.timeout(5):
        while await _running(service) != number:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("factory", ["start_slow"])
@pytest.mark.parametrize("body", [{}, {"n": 2}, {"prompt": ["ab", "cd"]}])
@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_leaves_frees_its_request(service: Any, body: dict[str, Any], stream: bool) -> None:
    text = json.dumps({**FOREVER, **body, "stream": stream})
    reader, writer = await asyncio.open_connection(*service.url.removeprefix("http://").split(":"))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    writer.write(f"{head}\r\n\r\n{text}".encode())
    if stream:
        await reader.readuntil(b"data: ")
    await _until_running(service, 2 if "prompt" in body else 1)
    writer.close()
    begin = time.monotonic()
    await _until_running(service, 0)
    assert time.monotonic() - begin < 0.5  # the request alone would run for 1.2 s
    answer = await service.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
    assert answer.json()["choices"][0]["text"] == "x"


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_some_clients_leave_and_the_others_are_exact(service: Any) -> None:
    async def one(number: int) -> None:
        prompt = chr(97 + number) + "-"
        body = {"prompt": prompt, "max_tokens": 20, "stream": True}
        text = ""
        async with service.client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if number % 2 and len(text) > 5:
                    return
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        assert text == prompt * 10

    await asyncio.gather(*(one(number) for number in range(16)))
    await _until_running(service, 0)


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_dead_engine_ends_requests_and_turns_health_red(service: Any) -> None:
    stream = asyncio.create_task(service.client.post("/v1/completions", json={**FOREVER, "stream": True}))
    whole = asyncio.create_task(service.client.post("/v1/completions", json=FOREVER))
    await _until_running(service, 2)
    service.engine._link.process.kill()
    async with asyncio.timeout(1):
        streamed, answered = await stream, await whole
    assert answered.status_code == 503 and "signal 9" in answered.json()["error"]["message"]
    assert answered.json()["error"]["code"] == "engine_dead"
    assert "signal 9" in streamed.text.split("\n\n")[-3]
    health = await service.client.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "dead" and "signal 9" in health.json()["phase"]
    assert (await service.client.post("/v1/completions", json=FOREVER)).status_code == 503
    assert (await service.client.get("/live")).status_code == 200
    assert isinstance(service.engine.dead, EngineDeadError)


async def test_collections_leave_out_what_the_start_has_made(tmp_path: Path) -> None:
    """Looking at all of it for garbage would hold up every stream."""
    async with server_process(tmp_path, "start") as server:
        await server.said(READY)
        server.process.send_signal(signal.SIGTERM)
        assert int(await server.said(r"(\d+) objects are never looked at")) > 50_000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_drains(tmp_path: Path, number: int) -> None:
    async with server_process(tmp_path, "start_slow") as server:
        url = await server.said(READY)
        pid = await server.engine_pid()
        body = {**FOREVER, "prompt": "ab"}
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            answer = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(0.3)
            server.process.send_signal(number)
            assert (await answer).json()["choices"][0]["text"] == "ab" * 30
        assert await server.process.wait() == 0
        await until_gone(pid)


async def test_requests_that_outlast_the_shutdown_timeout_end_with_an_error(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_slow", shutdown_timeout=0.2) as server:
        url = await server.said(READY)
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            answer = asyncio.create_task(client.post("/v1/completions", json=FOREVER))
            await asyncio.sleep(0.3)
            server.process.terminate()
            assert (await answer).status_code == 503
            assert "shutting down" in (await answer).json()["error"]["message"]
        assert await server.process.wait() == 0


async def test_killed_engine_ends_the_server(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_slow") as server:
        url = await server.said(READY)
        request = await start_request(url)
        os.kill(await server.engine_pid(), signal.SIGKILL)
        await request
        await server.said(r"octavo: (The engine process ended unexpectedly \(signal 9\))")
        assert await server.process.wait() == 1


async def test_killed_server_ends_the_engine(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_slow") as server:
        url = await server.said(READY)
        request = await start_request(url)
        pid = await server.engine_pid()
        server.process.kill()
        with pytest.raises(httpx.HTTPError):
            await request
        await until_gone(pid)


async def test_port_opens_at_once_and_tells_the_phase(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_late") as server:
        await server.said("(loading weights)")
        pid = server.process.pid
        port = await asyncio.to_thread(_listening_port, pid)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            health = await client.get("/health")
            assert health.status_code == 503
            assert health.json() == {"status": "starting", "phase": "loading weights"}
            assert (await client.get("/live")).status_code == 200
            answer = await client.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert "loading weights" in answer.json()["error"]["message"]
            await server.said("(Ready)")
            assert (await client.get("/health")).status_code == 200


def _listening_port(pid: int) -> int:
    """The TCP port that a process listens on (state 0A in /proc)."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
        sockets |= {found[1]} if found else set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in sockets:
            return int(fields[1].partition(":")[2], 16)
    raise AssertionError("The server listens on no port")


@pytest.mark.parametrize(
    ("factory", "message"), [("refuse", "block_size is 16, which"), ("die", "exit status 7"), ("break_down", "a bug")]
)
async def test_failed_start_ends_the_server_with_the_reason(tmp_path: Path, factory: str, message: str) -> None:
    async with server_process(tmp_path, factory) as server:
        await server.said(f"octavo: .*({message})")
        assert await server.process.wait() == 1


async def test_signal_during_the_start_ends_it_quietly(tmp_path: Path) -> None:
    async with server_process(tmp_path, "start_late") as server:
        await server.said("(loading weights)")
        pid = await server.engine_pid()
        server.process.terminate()
        assert await server.process.wait() == 0
        await until_gone(pid)


def test_serve_settings_are_checked() -> None:
    from octavo.errors import ConfigError
    from octavo_server.settings import ServerSettings

    assert (ServerSettings().host, ServerSettings().port) == ("127.0.0.1", 8000)
    for wrong in ({"port": 70000}, {"shutdown_timeout": -1.0}, {"uvicorn_log_level": "loud"}):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            ServerSettings(**wrong)  # type: ignore[arg-type]


def test_small_answers_are_sent_at_once() -> None:
    from octavo_server.serve import _listen

    with _listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_taken_port_is_one_sentence() -> None:
    from octavo.errors import ConfigError
    from octavo_server.serve import _listen

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .* --port"):
            _listen("127.0.0.1", port)


def test_serve_command_has_both_kinds_of_flags() -> None:
    from octavo.cli import Parser
    from octavo.config_args import engine_config, resolve
    from octavo_server.serve import ServeCommand
    from octavo_server.settings import ServerSettings

    parser = Parser(prog="octavo serve")
    ServeCommand().add_arguments(parser)
    args = parser.parse_args(["m", "--port", "1", "--served_model_name", "a,b", "--max-model-len", "1k"])
    settings = resolve(ServerSettings, args)
    assert (settings.port, settings.served_model_name) == (1, ("a", "b"))
    assert (engine_config(args).model, engine_config(args).max_model_len) == ("m", 1000)
