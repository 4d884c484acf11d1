"""Bodies, open requests, the queue and long texts."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from octavo.errors import RequestError
from octavo.text.threads import LONG_TEXT_CHARS, TextThreads, check_text
from octavo.text.tokenizer import Tokenizer
from octavo_server.settings import ServerSettings
from servers import FOREVER, Live, live_server

pytestmark = pytest.mark.usefixtures("helpers_in_child")


async def _post(live: Live, body: dict[str, Any], key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await live.client.post("/v1/completions", json=body, headers=headers)


async def _until_running(live: Live, number: int) -> None:
    async with asyncio.timeout(5):
        while (await live.engine.stats()).num_running != number:
            await asyncio.sleep(0.01)


async def test_large_bodies_are_refused_before_they_are_read(tokenizer: Tokenizer) -> None:
    async with live_server(tokenizer, ServerSettings(port=0, max_body_bytes=1000)) as live:
        content = b'{"prompt": "ab", "max_tokens": 1'.ljust(999) + b"}"
        json_type = {"Content-Type": "application/json"}
        answer = await live.client.post("/v1/completions", content=content, headers=json_type)
        assert answer.status_code == 200  # exactly what is allowed
        reader, writer = await asyncio.open_connection(*live.url.removeprefix("http://").split(":"))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"}}"), 5)  # not a byte of the body was sent
        assert head.startswith(b"HTTP/1.1 413") and b"1001 bytes, but at most 1000" in head
        writer.close()


async def test_bodies_of_unknown_length_are_counted(tokenizer: Tokenizer) -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"prompt": "'
        for _ in range(1000):
            yield b"a" * 1000
            sent += 1000
            await asyncio.sleep(0)

    async with live_server(tokenizer, ServerSettings(port=0, max_body_bytes=5000)) as live:
        headers = {"Content-Type": "application/json"}
        answer = await live.client.post("/v1/completions", content=pieces(), headers=headers)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert "--max-body-bytes" in answer.json()["error"]["message"]


async def test_a_key_has_so_many_requests_open(tokenizer: Tokenizer) -> None:
    settings = ServerSettings(port=0, max_concurrency_per_key=2)
    async with live_server(tokenizer, settings, "start_slow", keys=("a", "b")) as live:
        running = [asyncio.create_task(_post(live, FOREVER, "a")) for _ in range(2)]
        await _until_running(live, 2)
        refused = await _post(live, FOREVER, "a")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert error["code"] == "rate_limit_exceeded" and "2 requests open, but at most 2" in error["message"]
        health = await live.client.get("/v1/models", headers={"Authorization": "Bearer a"})
        assert health.status_code == 200
        assert (await _post(live, {"prompt": "a", "max_tokens": 1}, "b")).status_code == 200
        running[0].cancel()  # a client that leaves makes room
        await _until_running(live, 1)
        assert (await _post(live, {"prompt": "a", "max_tokens": 1}, "a")).status_code == 200
        assert (await running[1]).status_code == 200


@pytest.mark.parametrize("limit", [0, 3])
async def test_a_burst_fills_seats_and_queue_and_no_more(tokenizer: Tokenizer, limit: int) -> None:
    settings = ServerSettings(port=0, max_num_queued_reqs=limit)
    limits = httpx.Limits(max_connections=None)
    async with live_server(tokenizer, settings, "start_slow", limits=limits) as live:
        seats = live.engine.info.max_requests
        answers = await asyncio.gather(*(_post(live, FOREVER) for _ in range(seats + 20)))
        refused = [one for one in answers if one.status_code == 503]
        assert len(answers) - len(refused) == seats + limit
        assert all(one.headers["retry-after"] == "1" for one in refused)
        assert refused[0].json()["error"]["code"] == "queue_full" and "--max-num-queued-reqs" in refused[0].text
        assert (await _post(live, {"prompt": "a", "max_tokens": 1})).status_code == 200


async def test_prompt_tokens_may_wait_up_to_a_number(tokenizer: Tokenizer) -> None:
    settings = ServerSettings(port=0, max_num_queued_tokens=10)
    async with live_server(tokenizer, settings, "start_full") as live:
        running = [
            asyncio.create_task(_post(live, {**FOREVER, "prompt": "abcdef", "max_tokens": 50})) for _ in range(2)
        ]
        async with asyncio.timeout(5):
            while live.engine.stats_seen.num_waiting < 2:
                await asyncio.sleep(0.02)
        refused = await _post(live, {"prompt": "a", "max_tokens": 1})
        assert refused.status_code == 503
        message = refused.json()["error"]["message"]
        assert "12 prompt tokens wait, but at most 10 may (--max-num-queued-tokens)" in message
        for task in running:
            task.cancel()


async def test_text_that_cannot_fit_is_not_tokenised(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = Tokenizer.encode

    def watched(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        seen.append(len(text))
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        huge = "x" * 5_000_000
        for path, body in (
            ("completions", {"prompt": huge}),
            ("completions", {"prompt": ["a", huge]}),
            ("chat/completions", {"messages": [{"role": "user", "content": huge}]}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x" * 250}] * 2}),
        ):
            answer = await live.client.post(f"/v1/{path}", json=body)
            assert answer.status_code == 400 and "320 fits the model's context" in answer.text
    assert max(seen, default=0) < 320


async def test_a_million_wrong_items_are_refused_at_the_first(tokenizer: Tokenizer) -> None:
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        for path, body in (
            ("completions", {"prompt": ["a", *[1] * 500_000]}),
            ("completions", {"prompt": "a", "stop_token_ids": ["x"] * 500_000}),
            ("completions", {"prompt": ["a"] * 500_000}),
            ("chat/completions", {"messages": [{}] * 500_000}),
        ):
            content = json.dumps(body).encode()
            begin = time.perf_counter()
            headers = {"Content-Type": "application/json"}
            answer = await live.client.post(f"/v1/{path}", content=content, headers=headers)
            assert answer.status_code == 400
            assert time.perf_counter() - begin < 0.75, list(body)  # with an error for each item it takes seconds


def test_tokenising_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    assert len(tokenizer.encode("some words " * 100_000)) == 1_100_000
    end = time.perf_counter()
    done.set()
    thread.join()
    during = sum(begin < moment < end for moment in ticks)
    assert during > 10, f"{during} ticks in {end - begin:.2f} s"


async def test_short_texts_do_not_wait_for_long_ones() -> None:
    threads, release = TextThreads(), threading.Event()
    try:
        waiting = [asyncio.create_task(threads.run(LONG_TEXT_CHARS, release.wait)) for _ in range(5)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):
            assert await threads.run(1, lambda: "short") == "short"
        release.set()
        assert await asyncio.gather(*waiting) == [True] * 5
    finally:
        release.set()
        threads.shutdown()


def test_check_text_is_quick_and_strict(tokenizer: Tokenizer) -> None:
    width = tokenizer.max_chars_per_token
    assert width is not None
    check_text("é" * width * 2, tokenizer, 2)
    with pytest.raises(RequestError, match="surrogate"):
        check_text("a\udfff", tokenizer, 2)
    begin = time.perf_counter()
    with pytest.raises(RequestError, match="5000000 characters"):
        check_text("é" * 5_000_000, tokenizer, 2)
    assert time.perf_counter() - begin < 0.2


# -- heads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [b"x-long: " + b"a" * (1 << 21), b"x: y\r\n" * (1 << 18)], ids=["one", "many"])
async def test_headers_without_an_end_are_refused(tokenizer: Tokenizer, head: bytes) -> None:
    """Before a key is looked at: whoever reaches the port could fill the memory."""
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.client.base_url.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n" + head)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                assert (await reader.read()).startswith((b"HTTP/1.1 400", b""))
        writer.close()
        assert (await live.client.get("/health")).status_code == 200


async def test_the_body_of_a_client_that_offers_http_2_is_read(tokenizer: Tokenizer) -> None:
    """Java's HttpClient and `curl --http2` offer to upgrade each request."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        body = {"prompt": [5, 6, 7], "max_tokens": 2}
        answer = await live.client.post("/v1/completions", json=body, headers=offer)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 2)
