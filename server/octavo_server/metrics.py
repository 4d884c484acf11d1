"""GET /metrics: what the engine does, under vLLM's names, and what only Octavo tells."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from octavo.admission import EngineInfo
from octavo.async_engine import AsyncEngine, Observer
from octavo.engine.step import EngineStats
from octavo.output_processor import Delta
from octavo.sampling_params import SamplingParams
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

LABELS = ("model_name", "engine")
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
FIRST_TOKEN_BUCKETS = (*FIRST_TOKEN, 20, 40, 80, 160, 640, 2560)
TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
LENGTHS = ()
"""Stands for 1, 2, 5, 10, 20, 50, ... up to the model's context."""

GAUGES = {
    "num_requests_running": "Requests that the engine computes",
    "num_requests_waiting": "Requests that wait for the engine",
    "kv_cache_usage_perc": "Share of the KV cache's blocks in use, from 0 to 1",
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache",
    "prefix_cache_hits": "Prompt tokens that the prefix cache had",
    "num_preemptions": "Requests that gave their blocks back to be computed again",
    "prompt_tokens": "Prompt tokens of requests that have their first token",
    "prompt_tokens_cached": "Those of them that the prefix cache had",
    "generation_tokens": "Tokens that were generated",
}
HISTOGRAMS: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("From the engine's receipt of a request to its first token", FIRST_TOKEN_BUCKETS),
    "inter_token_latency_seconds": ("Between two tokens of a choice", TOKEN),
    "request_time_per_output_token_seconds": ("Mean time of a request's tokens after its first", TOKEN),
    "e2e_request_latency_seconds": ("From the engine's receipt of a request to its last token", WHOLE),
    "request_queue_time_seconds": ("From the engine's receipt of a request to its first step", WHOLE),
    "request_inference_time_seconds": ("From a request's first step to its last token", WHOLE),
    "request_prefill_time_seconds": ("From a request's first step to its first token", WHOLE),
    "request_decode_time_seconds": ("From a request's first token to its last", WHOLE),
    "request_prompt_tokens": ("Prompt tokens of a request", LENGTHS),
    "request_generation_tokens": ("Tokens of a choice", LENGTHS),
    "request_max_num_generation_tokens": ("Tokens of a request's longest choice", LENGTHS),
    "request_params_max_tokens": ("max_tokens of a request that sets it", LENGTHS),
    "request_prefill_kv_computed_tokens": ("Prompt tokens of a request that the prefix cache did not have", LENGTHS),
    "request_params_n": ("Choices of a request", CHOICES),
    "iteration_tokens_total": ("Tokens of a step, as the mean over the steps of a fraction of a second", STEP),
}


@dataclass(slots=True)
class _Request:
    """A request on its way; times in seconds of time.monotonic()."""

    params: SamplingParams
    num_prompt: int
    opened: float
    waited: float = 0.0
    first: float | None = None
    num_cached: int = 0
    last: dict[int, float] = field(default_factory=dict)
    num_generated: dict[int, int] = field(default_factory=dict)
    num_open: int = 0


class Metrics(Observer):
    """Counts and times the engine's requests. `model_name` is the label; called once the engine is ready."""

    def __init__(self, engine: AsyncEngine, model_name: Callable[[], str]) -> None:
        self._engine = engine
        self._model_name = model_name
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests: dict[str, _Request] = {}
        self._stats = EngineStats()

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics as text and their content type, for an Accept header."""
        if self._engine.ready:
            self._instruments.refresh(self._stats)
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    @cached_property
    def _instruments(self) -> "_Instruments":
        return _Instruments(self._registry, self._engine, self._model_name())

    def opened(self, key: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """A request is sent to the engine."""
        request = _Request(params, len(prompt_token_ids), time.monotonic(), num_open=params.n)
        self._requests[key] = request

    def started(self, key: str, seconds: float) -> None:
        """A request begins to run."""
        if (request := self._requests.get(key)) is not None:
            request.waited = seconds

    def gained(self, key: str, delta: Delta) -> None:
        """A choice of a request has new tokens or ends."""
        request = self._requests.get(key)
        if request is None:
            return
        now, known = time.monotonic(), self._instruments
        if request.first is None and delta.token_ids:
            request.first, request.num_cached = now, delta.num_cached_tokens or 0
            known.observe("time_to_first_token_seconds", now - request.opened)
            known.count("prompt_tokens", request.num_prompt)
            known.count("prompt_tokens_cached", request.num_cached)
            known.count_source(request.num_prompt - request.num_cached, request.num_cached)
        elif delta.token_ids and delta.index in request.last:
            known.observe("inter_token_latency_seconds", now - request.last[delta.index])
        if delta.token_ids:
            known.count("generation_tokens", len(delta.token_ids))
            request.last[delta.index] = now
            request.num_generated[delta.index] = request.num_generated.get(delta.index, 0) + len(delta.token_ids)
        if delta.finish_reason is not None:
            known.count_end(delta.finish_reason)
            request.num_open -= 1

    def closed(self, key: str) -> None:
        """A request has ended or was given up."""
        request = self._requests.pop(key, None)
        if request is None:
            return
        if request.num_open:
            self._instruments.count_end("abort", request.num_open)
        elif request.first is not None:
            self._record(request, request.first, max(request.last.values()))

    def fared(self, stats: EngineStats) -> None:
        """The engine's counters and gauges are these now."""
        old, self._stats, known = self._stats, stats, self._instruments
        if self._engine.config.enable_prefix_caching:
            known.count("prefix_cache_queries", stats.num_prompt_tokens - old.num_prompt_tokens)
        known.count("prefix_cache_hits", stats.num_cached_tokens - old.num_cached_tokens)
        known.count("num_preemptions", stats.num_preemptions - old.num_preemptions)
        num_steps = stats.num_steps - old.num_steps
        num_tokens = stats.num_prompt_tokens_computed - old.num_prompt_tokens_computed
        num_tokens += stats.num_generated_tokens - old.num_generated_tokens
        for _ in range(num_steps):
            known.observe("iteration_tokens_total", num_tokens / num_steps)

    def _record(self, request: _Request, first: float, last: float) -> None:
        """The histograms of a whole request."""
        known, begin = self._instruments, request.opened + request.waited
        longest = max(request.num_generated.values())
        known.observe("e2e_request_latency_seconds", last - request.opened)
        known.observe("request_queue_time_seconds", request.waited)
        known.observe("request_inference_time_seconds", last - begin)
        known.observe("request_prefill_time_seconds", first - begin)
        known.observe("request_decode_time_seconds", last - first)
        known.observe("request_prompt_tokens", request.num_prompt)
        known.observe("request_prefill_kv_computed_tokens", request.num_prompt - request.num_cached)
        known.observe("request_max_num_generation_tokens", longest)
        known.observe("request_params_n", request.params.n)
        if longest > 1:
            known.observe("request_time_per_output_token_seconds", (last - first) / (longest - 1))
        if request.params.max_tokens is not None:
            known.observe("request_params_max_tokens", request.params.max_tokens)
        for number in request.num_generated.values():
            known.observe("request_generation_tokens", number)


class _Instruments:
    """The metrics of a ready engine, by their names without a prefix."""

    def __init__(self, registry: CollectorRegistry, engine: AsyncEngine, model_name: str) -> None:
        self._registry = registry
        self._info = info = engine.info
        self._labels = {"model_name": model_name, "engine": "0"}
        lengths = length_buckets(info.max_model_len)
        self._gauges = {name: self._make(Gauge, f"vllm:{name}", text) for name, text in GAUGES.items()}
        self._counters = {name: self._make(Counter, f"vllm:{name}", text) for name, text in COUNTERS.items()}
        self._histograms = {
            name: self._make(Histogram, f"vllm:{name}", text, buckets=buckets or lengths)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        text = "Slots of the KV cache's partly filled blocks that hold no token, in bytes"
        self._wasted = self._make(Gauge, "octavo:kv_cache_wasted_bytes", text)
        self._held = self._make(Gauge, "octavo:kv_cache_used_bytes", "KV cache that requests hold, in bytes")
        text = "Share of the values written to a KV cache in 8 bits that were beyond its codes' range, from 0 to 1"
        self._clipped = self._make(Gauge, "octavo:kv_cache_clipped_ratio", text)
        self._ends = self._by("vllm:request_success", "Choices that ended, by how they did", "finished_reason")
        for reason in ("stop", "length", "abort", "error"):
            self.count_end(reason, 0)
        self._sources = self._by("vllm:prompt_tokens_by_source", "Prompt tokens by where their KV is from", "source")
        self._tell_facts(engine, info)

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        self._histograms[name].observe(value)

    def count(self, name: str, number: float) -> None:
        """Add to a counter."""
        self._counters[name].inc(number)

    def count_end(self, reason: str, number: int = 1) -> None:
        """Count choices that ended."""
        self._ends.labels(**self._labels, finished_reason=reason).inc(number)

    def count_source(self, num_computed: int, num_cached: int) -> None:
        """Count a request's prompt tokens."""
        self._sources.labels(**self._labels, source="local_compute").inc(num_computed)
        self._sources.labels(**self._labels, source="local_cache_hit").inc(num_cached)

    def refresh(self, stats: EngineStats) -> None:
        """Set the gauges."""
        self._gauges["num_requests_running"].set(stats.num_running)
        self._gauges["num_requests_waiting"].set(stats.num_waiting)
        self._gauges["kv_cache_usage_perc"].set(stats.kv_usage)
        size = self._info.kv_bytes_per_token
        self._held.set(stats.kv_slots * size)
        self._clipped.set(stats.num_kv_clipped / max(1, stats.num_kv_written))
        self._wasted.set((stats.kv_slots - stats.kv_tokens) * size)

    def _make(self, kind: Any, name: str, text: str, **options: Any) -> Any:
        return kind(name, f"{text}.", LABELS, registry=self._registry, **options).labels(**self._labels)

    def _by(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, f"{text}.", (*LABELS, label), registry=self._registry)

    def _tell_facts(self, engine: AsyncEngine, info: EngineInfo) -> None:
        config = engine.config
        self._fact(
            "vllm:cache_config_info",
            "The KV cache's configuration",
            block_size=info.block_size,
            cache_dtype=config.kv_cache_dtype,
            enable_prefix_caching=config.enable_prefix_caching,
            gpu_memory_utilization=config.gpu_memory_utilization,
            num_gpu_blocks=info.num_blocks,
            engine="0",
        )
        rows = {tuple(str(one.get(name, "")) for name in _BACKEND) for one in info.backends}
        backends = Gauge("octavo:backend_info", "A provider that serves.", _BACKEND, registry=self._registry)
        for row in sorted(rows):
            backends.labels(*row).set(1)

    def _fact(self, name: str, text: str, **labels: object) -> None:
        gauge = Gauge(name, f"{text}.", tuple(labels), registry=self._registry)
        gauge.labels(**{label: str(value) for label, value in labels.items()}).set(1)


_BACKEND = ("kind", "name", "plugin", "version")


def length_buckets(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    powers = range(len(str(most)))
    return tuple(value for power in powers for digit in (1, 2, 5) if (value := digit * 10**power) <= most)
