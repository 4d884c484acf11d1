"""What 8-bit KV caches cost the default model: perplexity over 4k tokens of a text that no calibration saw."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo.checkpoints.resolve import resolve_model
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.engine.step import EngineStats
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer
from octavo_gguf.reader import GGUFReader
from tiny_models import run, start

pytestmark = [pytest.mark.model, pytest.mark.slow]

TEXT = Path(__file__).parents[1] / "data" / "perplexity.txt"
NUM_TOKENS, AT_ONCE = 4096, 1024
PARAMS = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve_model("", readers=lambda: [GGUFReader, SafetensorsReader])


@pytest.fixture(scope="module")
def prompts(path: Path) -> list[list[int]]:
    ids = Tokenizer.from_files(path).encode(TEXT.read_text(encoding="utf-8"))[:NUM_TOKENS]
    assert len(ids) == NUM_TOKENS
    return [ids[at : at + AT_ONCE] for at in range(0, NUM_TOKENS, AT_ONCE)]


def perplexity(path: Path, prompts: list[list[int]], **options: Any) -> tuple[float, EngineStats]:
    """That of the prompts, and what became of the values of their tokens."""
    engine = start(path, max_model_len=AT_ONCE + 1, kv_cache_memory_bytes=1 << 28, num_threads=2, **options)
    logprobs = [one.logprob for answer in run(engine, prompts, PARAMS) for one in answer.prompt_logprobs]
    stats = engine.stats()
    engine.shutdown()
    assert len(logprobs) == NUM_TOKENS - len(prompts)
    return math.exp(-sum(logprobs) / len(logprobs)), stats


@pytest.fixture(scope="module")
def plain(path: Path, prompts: list[list[int]]) -> Iterator[float]:
    """The plain cache's."""
    yield perplexity(path, prompts)[0]


@pytest.mark.parametrize(("dtype", "most"), [("fp8", 0.01), ("int8", 0.01), ("fp8_e5m2", 0.06)])
def test_perplexity_beside_the_plain_caches(
    path: Path, prompts: list[list[int]], plain: float, dtype: str, most: float, tmp_path: Path
) -> None:
    """fp8_e5m2 has two bits of mantissa, so it is for models whose keys need the range more than the steps."""
    scales = {"download_dir": str(tmp_path), "kv_scales": "calibrate"}
    found, stats = perplexity(path, prompts, kv_cache_dtype=dtype, **scales)
    print(f"{dtype}: perplexity {found:.3f}, the plain cache's {plain:.3f} ({found / plain - 1:+.2%})")
    assert abs(found / plain - 1) < most
    assert stats.num_kv_clipped == 0 and stats.num_kv_written == 2 * 30 * 3 * 64 * NUM_TOKENS
