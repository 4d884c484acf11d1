"""/metrics under vLLM's names, and /v1/backends."""

import asyncio
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo_server.api_settings import ApiSettings
from octavo_server.metrics import COUNTERS, GAUGES, HISTOGRAMS, length_buckets
from prometheus_client.parser import text_string_to_metric_families

LABELS = {"model_name": "fake", "engine": "0"}


async def _samples(service: Any) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and the labels that are not the model's."""
    response = await service.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            own = tuple(value for name, value in sample.labels.items() if name not in LABELS)
            found[sample.name, own] = sample.value
    return found


async def _post(service: Any, **body: object) -> None:
    response = await service.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text


async def test_every_name_is_there_from_the_start(service: Any) -> None:
    text = (await service.client.get("/metrics")).text
    assert 'octavo:kv_cache_clipped_ratio{engine="0",model_name="fake"} 0.0' in text  # nothing is written yet
    families = {family.name: family for family in text_string_to_metric_families(text)}
    kinds = {
        **dict.fromkeys(GAUGES, "gauge"),
        **dict.fromkeys(COUNTERS, "counter"),
        **dict.fromkeys(HISTOGRAMS, "histogram"),
    }
    for name, kind in kinds.items():
        assert families[f"vllm:{name}"].type == kind
        assert all(sample.labels.items() >= LABELS.items() for sample in families[f"vllm:{name}"].samples)
    assert 'vllm:prompt_tokens_total{engine="0",model_name="fake"} 0.0' in text
    assert "process_resident_memory_bytes" in text


async def test_a_request_is_counted_and_timed(service: Any) -> None:
    await _post(service, prompt="abcd", max_tokens=3)
    found = await _samples(service)

    def one(name: str, *labels: str) -> float:
        return found[f"vllm:{name}", labels]

    assert (one("prompt_tokens_total"), one("generation_tokens_total"), one("prompt_tokens_cached_total")) == (4, 3, 2)
    assert one("prompt_tokens_by_source_total", "local_compute") == 2
    assert one("prompt_tokens_by_source_total", "local_cache_hit") == 2
    assert one("request_success_total", "length") == 1 and one("request_success_total", "stop") == 0
    assert one("inter_token_latency_seconds_count") == 2
    sums = {"prompt_tokens": 4, "generation_tokens": 3, "max_num_generation_tokens": 3, "params_max_tokens": 3}
    sums |= {"params_n": 1, "prefill_kv_computed_tokens": 2}
    for name, value in sums.items():
        assert (one(f"request_{name}_count"), one(f"request_{name}_sum")) == (1, value)
    for name in ("time_to_first_token_seconds", "request_time_per_output_token_seconds", "e2e_request_latency_seconds"):
        assert one(f"{name}_count") == 1
    phases = ("queue", "prefill", "decode")
    times = {name: one(f"request_{name}_time_seconds_sum") for name in (*phases, "inference")}
    assert times["prefill"] + times["decode"] == pytest.approx(times["inference"])
    whole = one("e2e_request_latency_seconds_sum")
    assert times["queue"] + times["inference"] == pytest.approx(whole) and 0 < whole < 5


async def test_choices_are_counted_one_by_one(service: Any) -> None:
    await _post(service, prompt=["ab", "abc"], n=2, max_tokens=2)
    found = await _samples(service)
    assert found["vllm:request_success_total", ("length",)] == 4
    assert found["vllm:prompt_tokens_total", ()] == 5
    assert found["vllm:request_params_n_sum", ()] == 4
    assert found["vllm:request_generation_tokens_count", ()] == 4
    assert found["vllm:request_max_num_generation_tokens_count", ()] == 2


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_gauges_follow_the_engine(service: Any) -> None:
    task = asyncio.create_task(_post(service, prompt="ab", max_tokens=60, ignore_eos=True))
    async with asyncio.timeout(5):
        while not (found := await _samples(service))["vllm:num_requests_running", ()]:
            await asyncio.sleep(0.05)
    assert found["vllm:kv_cache_usage_perc", ()] == 1 / fake_engine.NUM_BLOCKS
    assert found["octavo:kv_cache_used_bytes", ()] == 1600
    assert found["octavo:kv_cache_wasted_bytes", ()] == 1500
    task.cancel()
    async with asyncio.timeout(5):
        while (found := await _samples(service))["vllm:num_requests_running", ()]:
            await asyncio.sleep(0.05)
    assert found["octavo:kv_cache_wasted_bytes", ()] == 0
    assert found["vllm:request_success_total", ("abort",)] == 1
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 0


async def test_counters_of_the_engine_add_up(service: Any) -> None:
    for _ in range(2):
        await _post(service, prompt="abcd", max_tokens=3)
        async with asyncio.timeout(5):
            while (await service.engine.stats()).num_running:
                await asyncio.sleep(0.01)
    found = await _samples(service)
    assert found["vllm:prefix_cache_queries_total", ()] == 8
    assert found["vllm:prefix_cache_hits_total", ()] == 4
    assert found["octavo:kv_cache_clipped_ratio", ()] == 0.25
    assert found["vllm:iteration_tokens_total_count", ()] == 6
    assert found["vllm:iteration_tokens_total_sum", ()] == 4 + 6


async def test_errors_are_counted(service: Any) -> None:
    assert (await service.client.post("/v1/completions", json={"prompt": [fake_engine.FAIL]})).status_code == 500
    assert (await _samples(service))["vllm:request_success_total", ("error",)] == 1


async def test_facts_are_labels(service: Any) -> None:
    found = await _samples(service)
    assert found["octavo:backend_info", ("attention", "one", "fake", "1.0")] == 1
    text = (await service.client.get("/metrics")).text
    (line,) = (one for one in text.splitlines() if one.startswith("vllm:cache_config_info{"))
    assert 'block_size="16"' in line and 'num_gpu_blocks="10"' in line and line.endswith(" 1.0")


@pytest.mark.parametrize("settings", [ApiSettings(disable_log_stats=True)])
async def test_metrics_may_be_off(service: Any) -> None:
    await _post(service, prompt="abcd", max_tokens=3)
    found = await _samples(service)
    assert found["vllm:generation_tokens_total", ()] == 0 and ("process_cpu_seconds_total", ()) in found


async def test_metrics_answer_before_the_engine_is_ready() -> None:
    import httpx
    from octavo_server.app import create_app

    app = create_app(AsyncEngine(EngineConfig()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
        answer = await client.get("/metrics")
        assert answer.status_code == 200 and "process_cpu_seconds_total" in answer.text and "vllm:" not in answer.text
        assert (await client.get("/v1/backends")).status_code == 503


async def test_prometheus_may_ask_for_openmetrics(service: Any) -> None:
    answer = await service.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text") and answer.text.endswith("# EOF\n")


def test_lengths_have_buckets_up_to_the_context() -> None:
    assert length_buckets(64) == (1, 2, 5, 10, 20, 50)
    assert length_buckets(8192)[-1] == 5000 and length_buckets(1) == (1,)


async def test_backends(service: Any) -> None:
    answer = (await service.client.get("/v1/backends")).json()
    assert (answer["model"], answer["device"], answer["dtype"]) == ("fake", "cpu", "float32")
    assert answer["kv_scales"] == "calibrated now"
    attention, matmul = answer["data"]
    assert (attention["kind"], attention["name"], attention["uses"]) == ("attention", "one", 1)
    assert attention["candidates"][1] == {
        "name": "other",
        "plugin": "fake",
        "chosen": False,
        "reason": "it is not there",
    }
    assert (matmul["name"], matmul["uses"]) == ("two", 2)


def test_the_page_names_every_metric() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in (*GAUGES, *COUNTERS, *HISTOGRAMS) if f"`{name}`" not in page] == []
