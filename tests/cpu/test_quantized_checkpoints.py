"""Whole quantized checkpoints of SmolLM2-135M, each beside the dense model of its dequantized weights.

OCTAVO_CHECKPOINTS names the folder that holds them (CONTRIBUTING.md); -s shows the table of perplexities.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dequantized import write_dequantized
from octavo import LLM, SamplingParams
from perplexity import perplexity
from tiny_models import generate
from transformers import AutoModelForCausalLM

VARIABLE = "OCTAVO_CHECKPOINTS"
FOLDER = Path(os.environ.get(VARIABLE, ""))
TEXT = Path(__file__).parents[1] / "data" / "unseen.txt"
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "def fibonacci(n):",
    "The three primary colours are",
    "To make a good cup of tea, first",
    "In 1969, the first human being set foot on",
    "My favourite season is autumn, because the leaves",
    "A triangle has three",
    "The largest planet in the solar system",
    "Dear neighbour,",
    "She opened the door and saw",
    "Bees are important because",
    "1, 2, 3, 4,",
    "The opposite of cold is",
    "If I could travel anywhere, I would",
)


def quantized() -> list[str]:
    """The names of the folder's quantized checkpoints."""
    configs = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*/config.json")}
    return sorted(name for name, config in configs.items() if "quantization_config" in config)


NAMES = quantized() if VARIABLE in os.environ else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no folder of quantized checkpoints"),
]


def start(model: Path | str) -> LLM:
    """An engine in float32 with the plain KV cache."""
    return LLM(
        str(model),
        dtype="float32",
        kv_cache_dtype="plain",
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        progress=False,
    )


def greedy(llm: LLM) -> list[list[int]]:
    """64 greedy tokens of each prompt."""
    return [output.outputs[0].token_ids for output in llm.generate(list(PROMPTS), GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module", params=NAMES or ["none"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Each checkpoint in turn."""
    assert NAMES, f"{VARIABLE} is {FOLDER}, which holds no quantized checkpoint."
    with start(FOLDER / request.param) as llm:
        yield llm


@pytest.fixture
def dense(llm: LLM, tmp_path: Path) -> Path:
    """The checkpoint's dense twin."""
    write_dequantized(Path(llm.config.model), tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture(scope="module")
def dense_perplexity() -> float:
    """The perplexity of the model that the checkpoints were made of."""
    with start("") as llm:
        value = perplexity(llm, TEXT.read_text(encoding="utf-8"))
    print(f"\n{'dense':24}{value:8.3f}")
    return value


def test_it_names_paris(llm: LLM) -> None:
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    answers = [*llm.generate(PROMPTS[0], GREEDY, use_tqdm=False), *llm.chat(asked, GREEDY, use_tqdm=False)]
    assert [" Paris" in answer.outputs[0].text for answer in answers] == [True, True]


def test_its_tokens_are_those_of_its_dequantized_weights(llm: LLM, dense: Path) -> None:
    tokens = greedy(llm)
    assert {len(one) for one in tokens} == {64}
    assert len({tuple(one) for one in tokens}) == len(PROMPTS)
    with start(dense) as twin:
        assert greedy(twin) == tokens
    if Path(llm.config.model).name == NAMES[0]:  # that the engine is right is tested elsewhere
        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
        prompts = [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]
        assert generate(model, prompts, 64)[0] == tokens


def test_its_perplexity_is_near_the_dense_models(llm: LLM, dense_perplexity: float) -> None:
    value = perplexity(llm, TEXT.read_text(encoding="utf-8"))
    print(f"{Path(llm.config.model).name:24}{value:8.3f}{value / dense_perplexity - 1:+8.1%}")
    assert value < dense_perplexity * 1.5
