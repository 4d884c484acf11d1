"""Whatever is sent: no 5xx, no hang, OpenAI's shape of errors; afterwards no block is held and answers are the same."""

import asyncio
import contextlib
import os
import re
import resource
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.text.tokenizer import Tokenizer
from octavo_server.serve import build_app
from octavo_server.settings import ServerSettings
from servers import READY, fake_command

SECONDS = 20.0
JSON = {"Content-Type": "application/json"}
FEW, MANY = 250, 5000
ASKED = {"prompt": "the same again", "seed": 5, "temperature": 0, "max_tokens": 20, "return_token_ids": True}
_PART = {"type": "text", "text": "u"}
_CHAT = {
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [_PART]}],
    "max_completion_tokens": 9,
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"a": 1},
}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "ab", "max_tokens": 9, "n": 2, "stop": ["x"], "logprobs": 2, "seed": 1}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/completions", {"prompt": ["a", "b"], "echo": True, "logit_bias": {"5": 1.5}, "stop_token_ids": [7, 8]}),
    ("/v1/chat/completions", _CHAT),
    ("/tokenize", {"prompt": "abc"}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]


class Target(ABC):
    """A server over a real engine without a model."""

    @abstractmethod
    def send(self, method: str, path: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        """The answer; an exception after SECONDS."""

    @abstractmethod
    def held(self) -> tuple[float, float, float]:
        """Requests that run, that wait, and what is held of the KV cache."""

    def check(self, method: str, path: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        """Send, and see that the answer is well formed."""
        response = self.send(method, path, content, headers)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]

    def answer(self) -> list[int]:
        """The tokens of a fixed question."""
        response = self.send("POST", "/v1/completions", fuzz.written(ASKED))
        assert response.status_code == 200, response.text
        tokens: list[int] = response.json()["choices"][0]["token_ids"]
        return tokens


class Here(Target):
    """The app in this process, called without a network between."""

    def __init__(self, engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._app = build_app(engine, ServerSettings())

    def send(self, method: str, path: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        return self._loop.run_until_complete(self._send(method, path, content, headers or {}))

    async def _send(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client, asyncio.timeout(SECONDS):
            return await client.request(method, path, content=content, headers={**JSON, **headers})

    def held(self) -> tuple[float, float, float]:
        stats = self._loop.run_until_complete(self._engine.stats())
        return stats.num_running, stats.num_waiting, stats.num_blocks_used


class There(Target):
    """A server in processes of its own, `pids`."""

    def __init__(self, client: httpx.Client, pids: list[int]) -> None:
        self._client = client
        self._pids = pids

    def send(self, method: str, path: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        return self._client.request(method, path, content=content, headers={**JSON, **(headers or {})})

    def held(self) -> tuple[float, float, float]:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        lines = self._client.get("/metrics").text.splitlines()
        found = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(names)}
        return found[names[0]], found[names[1]], found[names[2]]

    def resident_bytes(self) -> int:
        """What the processes have in memory."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._pids)
        return pages * resource.getpagesize()


@pytest.fixture(scope="module")
def helpers_for_children() -> Iterator[None]:
    """Processes find tests/helpers."""
    helpers = str(Path(__file__).parents[1] / "helpers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([helpers, *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield


@pytest.fixture(scope="module")
def target(tokenizer: Tokenizer, helpers_for_children: None) -> Iterator[Here]:
    """A target that answers the same question the same way before and after, with nothing held in the end."""
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        starting = AsyncEngine.start(EngineConfig(), factory="hash_engine:start", tokenizer=tokenizer)
        engine = loop.run_until_complete(starting)
        target = Here(engine, loop)
        before = target.answer()
        yield target
        assert target.held() == (0, 0, 0)
        assert target.answer() == before
        loop.run_until_complete(engine.shutdown())


@pytest.fixture
def server(tmp_path: Path, helpers_for_children: None) -> Iterator[There]:
    """A server of its own."""
    command = fake_command(tmp_path, "hash_engine:start")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(READY, line)))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        with httpx.Client(base_url=url, timeout=SECONDS) as client:
            yield There(client, [process.pid, *map(int, children)])
        process.terminate()
        assert process.wait(30) == 0


def _often(number: int) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=number, deadline=None, suppress_health_check=checks, database=None)


def _fuzz_document(target: Target, number: int) -> None:
    @_often(number)
    @given(fuzz.documented(target.send("GET", "/openapi.json", b"").json()))
    def run(request: tuple[str, str, bytes]) -> None:
        target.check(*request)

    run()
    assert target.held() == (0, 0, 0)


def _fuzz_mutations(target: Target, number: int) -> None:
    kinds = st.sampled_from(GOOD).flatmap(lambda one: st.tuples(st.just(one[0]), fuzz.mutated([one[1]])))

    @_often(number)
    @given(kinds)
    def run(request: tuple[str, bytes]) -> None:
        target.check("POST", *request)

    run()
    assert target.held() == (0, 0, 0)


def test_good_bodies_are_good(target: Target) -> None:
    for path, body in GOOD:
        response = target.send("POST", path, fuzz.written(body))
        assert response.status_code == 200, (path, response.text)


def test_requests_from_our_own_document(target: Target) -> None:
    _fuzz_document(target, FEW)


def test_mutated_bodies(target: Target) -> None:
    _fuzz_mutations(target, FEW)


@_often(100)
@given(
    name=st.sampled_from(["X-Request-Id", "Authorization", "Content-Type", "Origin", "traceparent", "Content-Length"]),
    value=st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=30),
)
def test_odd_headers(target: Target, name: str, value: str) -> None:
    transport_headers = {name: value.encode("latin-1").decode("latin-1")}
    with contextlib.suppress(UnicodeEncodeError):  # the client's own refusal
        target.check("POST", "/v1/completions", fuzz.written({"prompt": "a", "max_tokens": 2}), transport_headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "\ud800"}),
        ("completions", {"prompt": ["a", "\udfff"]}),
        ("completions", {"prompt": "a", "stop": "\ud800"}),
        ("completions", {"prompt": "a", "stop": ["b", "\ud800"]}),
        ("completions", {"prompt": "a", "cache_salt": "\ud800"}),
        ("completions", {"prompt": "a", "request_id": "\ud800"}),
        ("completions", {"prompt": "a", "model": "\ud800"}),
        ("completions", {"prompt": "a", "logit_bias": {"\ud800": 1}}),
        ("completions", {"prompt": "a", "\ud800": 1}),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}),
        ("chat/completions", {"messages": [{"role": "\ud800", "content": "a"}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": "\ud800"}}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "tool_calls": [{"a": "\ud800"}]}]}),
    ],
)
def test_half_surrogates_are_refused_in_every_text(target: Target, path: str, body: dict[str, Any]) -> None:
    response = target.send("POST", f"/v1/{path}", fuzz.written(body))
    assert response.status_code == 400, response.text


@pytest.mark.parametrize("depth", [50, 400, 900, 5000, 100_000])
@pytest.mark.parametrize("field", ["prompt", "zzz", "logit_bias", "stop", "user", "metadata", "chat_template_kwargs"])
def test_deep_nesting_is_no_fault_of_the_server(target: Target, field: str, depth: int) -> None:
    for path, start in (("completions", '{"prompt": "a"'), ("chat/completions", fuzz.written(_CHAT).decode()[:-1])):
        for opening, closing in ("[]", ('{"a":', "}")):
            value = opening * depth + "1" + closing * depth
            target.check("POST", f"/v1/{path}", f'{start}, "{field}": {value}}}'.encode())


def _fuzz_schemathesis(target: Target, number: int) -> None:
    """The same with requests that schemathesis makes of the document: half of them meant to be right, half wrong."""
    schemathesis = pytest.importorskip("schemathesis")
    document = schemathesis.openapi.from_dict(target.send("GET", "/openapi.json", b"").json())
    operations = [one.ok() for one in document.get_all_operations()]
    for mode in schemathesis.GenerationMode:
        cases = st.one_of([one.as_strategy(generation_mode=mode) for one in operations])

        @_often(number // 2)
        @given(cases)
        def run(case: Any) -> None:
            request = case.as_transport_kwargs(base_url="http://server")
            body = fuzz.written(request["json"]) if "json" in request else request.get("data") or b""
            target.check(request["method"], case.formatted_path, body)

        run()
    assert target.held() == (0, 0, 0)


@pytest.mark.slow
def test_five_thousand_requests_of_schemathesis(server: There) -> None:
    before = server.answer()
    _fuzz_schemathesis(server, FEW)
    resident = server.resident_bytes()
    _fuzz_schemathesis(server, MANY)
    print(f"memory after {server.resident_bytes() / resident:.3f} of before")
    assert server.resident_bytes() < 1.05 * resident
    assert server.answer() == before


@pytest.mark.slow
def test_ten_thousand_requests(server: There) -> None:
    before = server.answer()
    _fuzz_document(server, FEW)  # what is loaded at the first use is no leak
    _fuzz_mutations(server, FEW)
    resident = server.resident_bytes()
    _fuzz_document(server, MANY)
    _fuzz_mutations(server, MANY)
    print(f"memory after {server.resident_bytes() / resident:.3f} of before")
    assert server.resident_bytes() < 1.05 * resident
    assert server.answer() == before
