"""OpenTelemetry traces: a span for each request to the engine, under the names that vLLM's dashboards know."""

import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from octavo import __version__
from octavo.async_engine import AsyncEngine
from octavo.errors import ConfigError
from octavo.output_processor import Delta
from octavo.request_stream import Observer
from octavo.sampling_params import SamplingParams
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

SPAN = "llm_request"
_carrier: ContextVar[dict[str, str] | None] = ContextVar("trace_carrier", default=None)


class TraceContext:
    """Middleware: remembers the trace that a client's `traceparent` and `tracestate` headers belong to."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        token = _carrier.set({name: headers[name] for name in ("traceparent", "tracestate") if name in headers})
        try:
            await self._app(scope, receive, send)
        finally:
            _carrier.reset(token)


class Traces(Observer):
    """Makes a span of each request. `tracer` is an OpenTelemetry tracer; `extract` makes a context of headers."""

    def __init__(self, engine: AsyncEngine, tracer: Any, extract: Callable[[dict[str, str]], Any], kind: Any) -> None:
        self._engine = engine
        self._tracer = tracer
        self._extract = extract
        self._kind = kind
        self._open: dict[str, _Span] = {}

    def opened(self, key: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Begin a span with what is asked."""
        attributes = {
            "gen_ai.request.id": key.rpartition("#")[0],
            "gen_ai.response.model": self._engine.info.model,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.n": params.n,
            "gen_ai.usage.prompt_tokens": len(prompt_token_ids),
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        context = self._extract(_carrier.get() or {})
        span = self._tracer.start_span(SPAN, context=context, kind=self._kind, attributes=attributes)
        self._open[key] = _Span(span)

    def started(self, key: str, seconds: float) -> None:
        """Note how long it waited."""
        if (one := self._open.get(key)) is not None:
            one.span.set_attribute("gen_ai.latency.time_in_queue", seconds)

    def gained(self, key: str, delta: Delta) -> None:
        """Count tokens, and note when the first came."""
        if (one := self._open.get(key)) is not None:
            one.take(delta)

    def closed(self, key: str) -> None:
        """End the span."""
        if (one := self._open.pop(key, None)) is not None:
            one.end()


class _Span:
    """A request's span while it is open."""

    def __init__(self, span: Any) -> None:
        self.span = span
        self._begin = time.perf_counter()
        self._num_tokens = 0
        self._reasons: dict[int, str] = {}

    def take(self, delta: Delta) -> None:
        if not self._num_tokens and delta.token_ids:
            self.span.set_attribute("gen_ai.latency.time_to_first_token", time.perf_counter() - self._begin)
        self._num_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._reasons[delta.index] = delta.finish_reason

    def end(self) -> None:
        self.span.set_attribute("gen_ai.usage.completion_tokens", self._num_tokens)
        self.span.set_attribute("gen_ai.latency.e2e", time.perf_counter() - self._begin)
        reasons = [self._reasons[index] for index in sorted(self._reasons)] or ["abort"]
        self.span.set_attribute("gen_ai.response.finish_reasons", reasons)
        self.span.end()


def trace(app: FastAPI, endpoint: str | None, engine: AsyncEngine) -> Observer | None:
    """Send traces to an endpoint, if there is one. Returns the observer that makes them.

    Raises ConfigError when OpenTelemetry is not installed or the endpoint is no URL.
    """
    if endpoint is None:
        return None
    provider = _provider(endpoint)
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    app.add_middleware(TraceContext)
    extract = TraceContextTextMapPropagator().extract
    return Traces(engine, provider.get_tracer("octavo", __version__), extract, SpanKind.SERVER)


def _provider(endpoint: str) -> Any:
    scheme, separator, rest = endpoint.partition("://")
    if not separator or scheme not in ("http", "https", "grpc"):
        raise ConfigError(f"--otlp-traces-endpoint is {endpoint!r}, but must begin with http://, https:// or grpc://.")
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter: Any
        if scheme == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GRPCExporter

            exporter = GRPCExporter(endpoint=rest, insecure=True)
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HTTPExporter

            exporter = HTTPExporter(endpoint=endpoint)
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry, which is not installed ({error}). "
            "Install it with pip install 'octavo[otel]'."
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "octavo"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
