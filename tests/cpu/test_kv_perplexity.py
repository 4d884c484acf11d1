"""What 8-bit KV caches cost the default model: perplexity over 4k tokens of a text that no calibration saw."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo import LLM
from perplexity import WINDOW, perplexity

pytestmark = [pytest.mark.model, pytest.mark.slow]

TEXT = Path(__file__).parents[1] / "data" / "unseen.txt"


def measure(**options: Any) -> float:
    """The perplexity of the default model in float32, with these options."""
    with LLM(
        dtype="float32", max_model_len=WINDOW + 1, kv_cache_memory_bytes=1 << 28, progress=False, **options
    ) as llm:
        return perplexity(llm, TEXT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def plain() -> Iterator[float]:
    """The plain cache's."""
    yield measure()


@pytest.mark.parametrize(("dtype", "most"), [("fp8", 0.01), ("int8", 0.01), ("fp8_e5m2", 0.06)])
def test_perplexity_beside_the_plain_caches(plain: float, dtype: str, most: float) -> None:
    """fp8_e5m2 has two bits of mantissa, so it is for models whose keys need the range more than the steps."""
    found = measure(kv_cache_dtype=dtype, kv_scales="calibrate")
    print(f"{dtype}: perplexity {found:.3f}, the plain cache's {plain:.3f} ({found / plain - 1:+.2%})")
    assert abs(found / plain - 1) < most
