"""Request ids, the log's lines and OpenTelemetry traces."""

import asyncio
import logging
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.text.tokenizer import Tokenizer
from octavo_server import tracing
from octavo_server.serve import build_app
from octavo_server.settings import ServerSettings
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from servers import Live, live_server

pytestmark = pytest.mark.usefixtures("helpers_in_child")
BODY = {"prompt": "abc", "max_tokens": 5, "temperature": 0.25}


async def _post(live: Live, headers: Any = None, **more: Any) -> Any:
    answer = await live.client.post("/v1/completions", json={**BODY, **more}, headers=headers or {})
    assert answer.status_code == 200, answer.text
    return answer


async def test_request_ids_come_back_only_when_asked_for(tokenizer: Tokenizer) -> None:
    async with live_server(tokenizer, ServerSettings(port=0, enable_request_id_headers=True)) as live:
        answer = await _post(live, {"X-Request-Id": "mine"})
        assert answer.headers["x-request-id"] == "mine" and answer.json()["id"] == "mine"
        drawn = {(await live.client.get("/live")).headers["x-request-id"] for _ in range(3)}
        assert len(drawn) == 3
        for bad in ("a b", "x" * 200, "é"):
            answer = await _post(live, {b"X-Request-Id": bad.encode("latin-1")})  # neither a header nor a log has it
            assert answer.headers["x-request-id"] != bad and answer.json()["id"].startswith("cmpl-")
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        answer = await _post(live, {"X-Request-Id": "mine"})
        assert "x-request-id" not in answer.headers and answer.json()["id"] == "mine"


async def test_access_lines_name_request_and_status(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo.access")
    settings = ServerSettings(port=0, disable_access_log_for_endpoints=("/live",))
    async with live_server(tokenizer, settings) as live:
        await live.client.get("/live")
        await live.client.get("/no%1Bthing", headers={"X-Request-Id": "mine"})
    (line,) = (record.getMessage() for record in caplog.records if record.name == "octavo.access")
    assert "GET '/no\\x1bthing' -> 404" in line and line.endswith("request mine")


async def test_requests_and_outputs_are_logged_as_far_as_asked(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "octavo.requests")

    async def lines(**settings: Any) -> list[str]:
        caplog.clear()
        async with live_server(tokenizer, ServerSettings(port=0, **settings)) as live:
            await _post(live, {"X-Request-Id": "mine"}, prompt="ab\ncd")
        return [record.getMessage() for record in caplog.records if record.name == "octavo.requests"]

    assert await lines() == []
    (line,) = await lines(enable_log_requests=True)
    assert "mine-0 (HTTP request mine): 5 prompt tokens" in line and "prompt 'ab\\ncd'" in line
    assert "'temperature': 0.25" in line and "top_p" not in line
    asked, answered = await lines(enable_log_requests=True, enable_log_outputs=True, max_log_len=2)
    assert "prompt 'ab'" in asked and "cd" not in asked
    assert answered == "mine-0 choice 0: 'ab'..."


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is traced, kept here in place of being sent."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_provider", lambda endpoint: provider)
    yield exporter
    provider.shutdown()


async def test_each_request_is_a_span_in_its_clients_trace(tokenizer: Tokenizer, spans: InMemorySpanExporter) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    async with live_server(tokenizer, ServerSettings(port=0, otlp_traces_endpoint="http://x")) as live:
        await _post(live, {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "mine"}, n=2)
        await _post(live)
        await live.client.get("/live")
    first, second = spans.get_finished_spans()
    assert first.name == "llm_request" and first.context is not None and first.parent is not None
    assert (first.context.trace_id, first.parent.span_id) == (int(trace, 16), int(parent, 16))
    assert second.parent is None
    found = dict(first.attributes or {})
    assert found["gen_ai.request.id"] == "mine-0" and found["gen_ai.response.model"] == "fake"
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (3, 10)
    assert (found["gen_ai.request.n"], found["gen_ai.request.temperature"]) == (2, 0.25)
    assert found["gen_ai.response.finish_reasons"] == ("length", "length")
    assert 0 < float(str(found["gen_ai.latency.time_to_first_token"])) <= float(str(found["gen_ai.latency.e2e"]))
    assert float(str(found["gen_ai.latency.time_in_queue"])) >= 0


async def test_a_client_that_leaves_ends_its_span(tokenizer: Tokenizer, spans: InMemorySpanExporter) -> None:
    settings = ServerSettings(port=0, otlp_traces_endpoint="http://x")
    async with live_server(tokenizer, settings, "start_slow") as live:
        task = asyncio.create_task(_post(live, max_tokens=60))
        async with asyncio.timeout(5):
            while not (await live.engine.stats()).num_running:
                await asyncio.sleep(0.01)
            task.cancel()
            while not spans.get_finished_spans():
                await asyncio.sleep(0.01)
    (span,) = spans.get_finished_spans()
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)


def test_traces_reach_an_endpoint() -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = Thread(target=collector.serve_forever)
        thread.start()
        provider = tracing._provider(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        provider.get_tracer("test").start_span("one").end()
        provider.shutdown()
        collector.shutdown()
        thread.join()
    ((path, body),) = received
    assert path == "/v1/traces" and b"octavo" in body


@pytest.mark.parametrize("endpoint", ["localhost:4317", "udp://x", ""])
def test_endpoint_must_be_a_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        build_app(AsyncEngine(EngineConfig()), ServerSettings(otlp_traces_endpoint=endpoint))


def test_without_opentelemetry_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[otel\]'"):
        tracing._provider("http://localhost:4318/v1/traces")
