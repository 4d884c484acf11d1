"""`octavo bench serve` and `startup`: the client against servers of the tests' own, and against ours."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from octavo.cli import main
from octavo.errors import ConfigError
from octavo.text.tokenizer import Tokenizer
from octavo_workbench import workloads
from octavo_workbench.bench.serve import arrivals, summarise
from octavo_workbench.bench.serve_client import Served, Server, Target, complete, drive
from octavo_workbench.http_client import Address, Chunks, Events
from octavo_workbench.workloads import Job, fixed

Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):X}\r\n".encode() + data + b"\r\n"


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Address]:
    """A server that gives each request's JSON to the handler, which writes the answer."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        (length,) = [int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length")]
        await handler(json.loads(await reader.readexactly(length)), writer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield Address("http", "127.0.0.1", server.sockets[0].getsockname()[1], "")


async def in_bits(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """Tokens 20 ms apart in chunked coding, every byte sent by itself."""
    writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    events = [event({"choices": [{"text": "a"}]}) for _ in range(body["max_tokens"])]
    usage = {"completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 16}}
    for data in (*events, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"):
        await asyncio.sleep(0.02)
        for byte in chunk(data):
            writer.write(bytes([byte]))
            await writer.drain()
    writer.write(b"0\r\n\r\n")


async def test_a_stream_is_timed_and_counted() -> None:
    async with serving(in_bits) as address:
        served = await complete(Server(address, "m"), Job([1, 2, 3], 4))
    assert served.error is None
    assert (served.num_prompt_tokens, served.num_output_tokens, served.num_cached_tokens) == (3, 4, 16)
    assert len(served.gaps) == 3 and min(served.gaps) > 0.01 and served.first > 0.015
    assert served.last == pytest.approx(served.first + sum(served.gaps))
    assert served.measure("tpot") == pytest.approx(sum(served.gaps) / 3)
    assert served.measure("ttft") == served.first and served.measure("e2el") == served.last


async def test_what_is_asked() -> None:
    asked: list[dict[str, Any]] = []

    async def handler(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        asked.append(body)
        writer.write(OK + b"\r\n" + event({"choices": [{}]}) + event({"choices": [{}]}))  # until the connection ends

    async with serving(handler) as address:
        assert (await complete(Server(address, "m"), Job([5, 6], 2))).error is None
        salted = Server(address, "m", salted=True)
        assert (await complete(salted, Job([5, 6], 2))).error is None
    first, second = asked
    assert second.pop("cache_salt") == salted.salt != Server(address, "m", salted=True).salt
    assert first == second
    assert first.pop("stream_options") == {"include_usage": True}
    wanted = {"model": "m", "prompt": [5, 6], "max_tokens": 2, "temperature": 0.0, "ignore_eos": True, "stream": True}
    assert first == wanted


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nwait", "HTTPError: The server answered 503: wait"),
        (OK + b"\r\n" + event({"choices": [{}]}), "1 tokens came, not 2"),
        (OK + b"\r\n" + event({"error": {"message": "broken"}}), "broken"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(event({"choices": [{}]})), "in the middle of an answer"),
        (OK + b"Content-Length: 99\r\n\r\n" + event({"choices": [{}]}), "in the middle of an answer"),
        (OK + b"\r\ndata: {]\n\n", "DecodeError"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "which is not HTTP/1.1"),
        (b"", "without an answer"),
    ],
)
async def test_failures_are_told(answer: bytes, words: str) -> None:
    async def handler(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with serving(handler) as address:
        served = await complete(Server(address, "m"), Job([1], 2))
    assert served.error is not None and words in served.error


async def test_requests_leave_at_their_times_and_wait_for_a_slot() -> None:
    at_once, most = 0, 0

    async def handler(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.03)
        at_once -= 1
        writer.write(OK + b"\r\n" + event({"choices": [{}]}))

    async with serving(handler) as address:
        server, job = Server(address, "m"), Job([1], 1)
        served, seconds = await drive(server, [Target(job, 0.0)] * 6, 2, "")
        assert most == 2 and seconds > 0.08
        assert all(one.error is None for one in served)
        _, seconds = await drive(server, [Target(job, 0.0), Target(job, 0.2)], None, "")
        assert seconds > 0.2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_bodies_in_pieces_of_any_size(size: int) -> None:
    data = [b"data: one\n", b"\ndata:two\r\n\r\n", b": a comment\n\ndata: three\n\n"]
    coded = b"5;name=value\r\n" + data[0][:5] + b"\r\n" + b"".join(map(chunk, [data[0][5:], *data[1:]])) + b"0\r\n\r\n"
    chunks, events = Chunks(), Events()
    found: list[bytes] = []
    for start in range(0, len(coded), size):
        found += events.feed(chunks.feed(coded[start : start + size]))
    assert found == [b"one", b"two", b"three"]
    assert chunks.ended


def test_addresses() -> None:
    assert Address.of("http://localhost:8000/v1/") == Address("http", "localhost", 8000, "")
    assert Address.of("https://h/api/v1") == Address("https", "h", 443, "/api")
    for url in ("localhost:8000", "ftp://h", "http://", "http://h:port"):
        with pytest.raises(ConfigError, match="--base-url is"):
            Address.of(url)


def test_arrivals() -> None:
    assert list(arrivals(3, None, 0)) == [0.0, 0.0, 0.0]
    times = list(arrivals(4001, 16.0, 0))
    assert times[0] == 0.0 and times == sorted(times)
    assert times[-1] == pytest.approx(4000 / 16, rel=0.05)
    assert times == list(arrivals(4001, 16.0, 0)) != list(arrivals(4001, 16.0, 1))


def test_the_summary_by_hand() -> None:
    served = [
        Served(10, 5, 0, 0.1, 0.5, [0.1] * 4),
        Served(20, 3, 0, 0.3, 0.7, [0.2] * 2),
        Served(5, 1, 0, 0.2, 0.2),
        Served(99, error="it failed"),
    ]
    summary = summarise(served, 2.0, [("ttft", 250.0), ("tpot", 150.0)])
    assert (summary.num_requests, summary.num_failed, summary.num_prompt_tokens) == (4, 1, 35)
    assert (summary.output_tokens_per_s, summary.tokens_per_s, summary.requests_per_s) == (4.5, 22.0, 1.5)
    assert summary.goodput == 1.0  # the first and the third
    assert summary.latencies["ttft"]["p50"] == pytest.approx(0.2)
    assert summary.latencies["tpot"]["mean"] == pytest.approx((0.1 + 0.2) / 2)
    assert summary.latencies["itl"]["p99"] == pytest.approx(0.2)
    assert summarise(served, 2.0, []).goodput is None
    assert summarise(served[3:], 2.0, []).latencies == {}


@pytest.mark.usefixtures("helpers_in_child")
async def test_our_server_is_measured(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from octavo_server.settings import ServerSettings
    from servers import live_server

    monkeypatch.setitem(workloads.WORKLOADS, "short", lambda: fixed(5, 12, 7, vocab_size=200))
    monkeypatch.setattr("octavo_workbench.bench.serve.fixed", lambda *sizes, seed: fixed(2, 4, 2, vocab_size=200))
    path = tmp_path / "it.json"
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        command = ["bench", "serve", "--base-url", live.url, "--workload", "short", "--request-rate", "500"]
        command += ["--goodput", "ttft:60000", "tpot:60000", "--no-progress", "--json", str(path)]
        assert await asyncio.to_thread(main, command) == 1  # this engine says that it found half of each prompt
    result = json.loads(path.read_text(encoding="utf-8"))
    assert (result["num_requests"], result["num_failed"]) == (5, 0)
    assert (result["num_prompt_tokens"], result["num_output_tokens"]) == (60, 35)
    assert result["goodput"] == pytest.approx(result["requests_per_s"])
    assert 0 < result["latencies"]["ttft"]["p50"] <= result["latencies"]["e2el"]["p99"]
    text = capsys.readouterr().out
    assert "time to first token" in text and "5 requests (0 failed)" in text
    assert "missed: 30 prompt tokens came from the prefix cache" in text


async def test_failed_requests_and_cached_tokens_fail_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    count = 0

    async def handler(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        if count == 1:
            writer.write(b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno")
        else:
            await in_bits(body, writer)

    async with serving(handler) as address:
        command = ["bench", "serve", "--base-url", f"http://127.0.0.1:{address.port}", "--model", "m", "--no-progress"]
        command += ["--workload", "3x4x1", "--warmup-requests", "0"]
        assert await asyncio.to_thread(main, command) == 1
    text = capsys.readouterr().out
    assert "missed: 1 of 3 requests failed, the first with: HTTPError: The server answered 500: no" in text
    assert "missed: 32 prompt tokens came from the prefix cache" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--base-url", "http://127.0.0.1:9"], "There is no server at http://127.0.0.1:9"),
        (["--base-url", "nowhere"], "--base-url is 'nowhere'"),
        (["--goodput", "speed:3"], "'speed:3' is no limit"),
        (["--request-rate", "0"], "'0' is not a number above 0"),
    ],
)
def test_bad_arguments_are_refused(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *args]) == 2
    assert words in capsys.readouterr().err


def test_startup_by_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "it.json"
    command = ["bench", "startup", "--shape", "tiny", "--device", "cpu", "--max-num-seqs", "4", "--no-progress"]
    assert main([*command, "--runs", "1", "--max-seconds", "0.01", "--json", str(path)]) == 1
    phases = json.loads(path.read_text(encoding="utf-8"))["median_seconds"]
    ready, first_token = phases.pop("ready"), phases.pop("first token after it")
    assert {"starting Python", "imports", "loading weights", "other"} <= set(phases)
    assert sum(phases.values()) == pytest.approx(ready, rel=0.01, abs=0.02)
    assert first_token > 0
    assert "not 0.01 s" in capsys.readouterr().out


def test_startup_tells_what_the_engine_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "/nowhere/at/all", "--device", "cpu", "--runs", "1", "--no-progress"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err
