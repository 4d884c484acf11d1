"""The server with the default model under load: exact texts, speed, and large prompts beside small ones."""

import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from raw_client import Timed, complete_all
from servers import READY

pytestmark = [pytest.mark.slow, pytest.mark.model]
HELPERS = Path(__file__).parents[1] / "helpers"
NUM_STREAMS, NUM_TOKENS = 64, 32


@contextmanager
def _serving(*flags: str) -> Iterator[str]:
    """The URL of a server with the default model, which must end well."""
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0", "--no-progress", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(READY, line)))
        try:
            yield url
        finally:
            process.terminate()
            said = process.stderr.read()
        assert process.wait(60) == 0, said


def _prompts(number: int, length: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 40_000) for _ in range(length)] for _ in range(number)]


def _texts(number: int) -> list[str]:
    return [f"Chapter {i + 1}. {'The story goes on, and on. ' * (i % 7)}Once upon a time" for i in range(number)]


def _until_idle(url: str) -> None:
    """Wait until nothing is held of the KV cache. The engine checks its blocks as it comes to rest, and ends if one is
    lost or shared by mistake."""
    deadline = time.monotonic() + 10
    while not re.search(r"^vllm:kv_cache_usage_perc\{.*\} 0\.0$", httpx.get(f"{url}/metrics").text, re.MULTILINE):
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.1)
    assert httpx.get(f"{url}/health").status_code == 200


async def _stream(client: httpx.AsyncClient, prompt: str, leave_after: int | None = None) -> str:
    """The text of a completion; with `leave_after`, only of its first events, after which the client is gone."""
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    text, num_events = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                num_events += 1
            if num_events == leave_after:
                return text
    return text


async def test_sixty_four_streams_are_exact_though_half_of_them_leave() -> None:
    with _serving("--dtype", "float32") as url:
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
            prompts = _texts(NUM_STREAMS)
            alone = [await _stream(client, prompt) for prompt in prompts]
            together = await asyncio.gather(*(_stream(client, prompt) for prompt in prompts))
            assert together == alone
            _until_idle(url)
            leaving = [5 + i % 11 if i % 2 else None for i in range(NUM_STREAMS)]
            some = await asyncio.gather(*map(_stream, [client] * NUM_STREAMS, prompts, leaving))
            assert some[::2] == alone[::2]
            parts = zip(some[1::2], alone[1::2], strict=True)
            assert all(whole.startswith(part) and part != whole for part, whole in parts)
            _until_idle(url)


class _Offline:
    """The engine without a server, in a process of its own."""

    def __init__(self, **arguments: Any) -> None:
        command = [sys.executable, str(HELPERS / "offline_worker.py"), json.dumps(arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def seconds(self, prompts: list[list[int]], max_tokens: int) -> float:
        """What the work takes."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self.process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def _online(url: str, prompts: list[list[int]], max_tokens: int) -> list[Timed]:
    answers = complete_all(url, [{"prompt": one, "max_tokens": max_tokens} for one in prompts])
    assert all(len(answer.times) <= max_tokens for answer in answers)
    return answers


def test_the_server_is_as_fast_as_the_engine() -> None:
    offline = _Offline(dtype="bfloat16", enable_prefix_caching=False)
    try:
        with _serving("--dtype", "bfloat16", "--no-enable-prefix-caching") as url:

            def ratio(number: int, length: int, max_tokens: int, rounds: int) -> float:
                """The median over pairs, in turns, of the server's time by the engine's: this cancels slow drifts."""
                found = []
                for turn in range(-1, rounds):  # the first warms up
                    prompts = _prompts(number, length, turn)
                    ours = offline.seconds(prompts, max_tokens) if turn % 2 else 0.0
                    theirs = max(one.times[-1] for one in _online(url, prompts, max_tokens))
                    ours = ours or offline.seconds(prompts, max_tokens)
                    found.append((ours, theirs))
                    print(f"{number} x {length} + {max_tokens}: offline {ours:.3f} s, server {theirs:.3f} s")
                return statistics.median(theirs / ours for ours, theirs in found[1:])

            first = ratio(1, 128, 1, 9)
            whole = ratio(32, 128, 128, 7)
            print(f"time to first token / offline prefill {first:.3f}; throughput server / offline {1 / whole:.3f}")
            assert first < 1.3
            assert 1 / whole >= 0.95
    finally:
        offline.process.kill()
        offline.process.communicate()


_POST = """
import sys, time, urllib.request, urllib.error
url, kind, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
prompt = b'"' + b"word " * 1_000_000 + b'"' if kind == "text" else b"[" + b"1234, " * 830_000 + b"1]"
request = urllib.request.Request(url + "/v1/completions", b'{"prompt": ' + prompt + b"}")
request.add_header("Content-Type", "application/json")
while True:
    try:
        urllib.request.urlopen(request)
        print("taken", flush=True)
    except urllib.error.HTTPError as error:
        print(error.code, flush=True)
    time.sleep(pause)
"""


def _gaps(url: str, seed: int) -> list[float]:
    answers = complete_all(url, [{"prompt": one, "max_tokens": 200} for one in _prompts(4, 64, seed)])
    return sorted(gap for answer in answers for gap in answer.gaps)


@pytest.mark.parametrize("kind", ["text", "token ids"])
def test_prompts_of_five_megabytes_hold_up_nobody(kind: str) -> None:
    with _serving("--num-threads", "1") as url:
        _gaps(url, 0)
        ratios = []
        for turn in range(3):
            quiet = _gaps(url, 2 * turn + 1)
            command = [sys.executable, "-c", _POST, url, kind, "0.2"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as poster:
                assert poster.stdout is not None and poster.stdout.readline() == "400\n"
                busy = _gaps(url, 2 * turn + 2)
                poster.terminate()
                statuses = poster.stdout.read().split()
            assert len(statuses) > 5 and set(statuses) == {"400"}
            p99 = [gaps[int(0.99 * len(gaps))] for gaps in (quiet, busy)]
            ratios.append(p99[1] / p99[0])
            print(f"{kind}: p99 {p99[0] * 1e3:.1f} ms between tokens, {p99[1] * 1e3:.1f} beside {len(statuses)} posts")
        assert statistics.median(ratios) < 2
