"""The default model in float32: transformers' greedy tokens, and what sharing blocks saves."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.checkpoints.resolve import resolve_model
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.engine.loop import Engine
from octavo.sampling_params import SamplingParams, choice_seed
from octavo.text.tokenizer import Tokenizer
from octavo_gguf.reader import GGUFReader
from tiny_models import GREEDY, Answer, generate, run, tokens_of
from tiny_models import start as start_any
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.model

TEXTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "def fibonacci(n):",
    "The three primary colours are",
    "To make a good cup of tea, first",
    "In 1969, the first human being set foot on",
    "My favourite season is autumn, because the leaves",
)


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve_model("", readers=lambda: [GGUFReader, SafetensorsReader])


@pytest.fixture(scope="module")
def prompts(path: Path) -> list[list[int]]:
    """Eight texts, and the first eight parts of them all as one text, of up to 90 tokens."""
    encode = Tokenizer.from_files(path).encode
    long = encode(" ".join(TEXTS))
    return [*(encode(text) for text in TEXTS), *(long[: 20 + 10 * i] for i in range(8))]


@pytest.fixture(scope="module")
def reference(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates in float32."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens, clear = generate(model, prompts, 64)
    assert clear > 1e-4  # no token hangs on rounding
    return tokens


@pytest.fixture
def start(path: Path) -> Iterator[Any]:
    """Starts engines, one at a time; each is checked and ended after the test."""
    engines: list[Engine] = []

    def start(**options: Any) -> Engine:
        usual = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28}
        engines.append(start_any(path, **usual | options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.scheduler.blocks.check()
        engine.shutdown()


def long_prompt(length: int) -> list[int]:
    """Random tokens that are no special ones."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1000, 40_000, (length,), generator=generator).tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"long_prefill_token_threshold": 7}, {"num_gpu_blocks_override": 72}],
    ids=["at-once", "chunks-of-7", "preempted"],
)
def test_tokens_are_transformers(
    start: Any, prompts: list[list[int]], reference: list[list[int]], options: dict[str, Any]
) -> None:
    engine = start(**options)
    assert tokens_of(run(engine, prompts)) == reference
    assert ("num_gpu_blocks_override" in options) == (engine.stats().num_preemptions > 0)
    if not options:  # once more, from the cache
        again = run(engine, prompts)
        assert tokens_of(again) == reference
        assert sum(answer.num_cached for answer in again) > 200


def test_same_prompt_again_is_cached(start: Any) -> None:
    engine, params = start(), replace(GREEDY, max_tokens=8)
    (first,), (again,) = (run(engine, [long_prompt(512)], params) for _ in range(2))
    assert first.num_cached == 0
    assert again.num_cached >= 496
    assert again.token_ids == first.token_ids
    computed = engine.stats().num_prompt_tokens_computed
    assert computed == 512 + 512 - again.num_cached


def test_eight_choices(start: Any, path: Path) -> None:
    """505 tokens fill 31 blocks; the 32nd is shared until the first decode step, in which all but one copy it."""
    engine, prompt = start(enable_prefix_caching=False), long_prompt(505)
    params = SamplingParams(n=8, max_tokens=16, ignore_eos=True, seed=4)
    engine.add_request("0", prompt, params)
    choices = [Answer() for _ in range(8)]
    stats = []
    while engine.has_work():
        for event in engine.step():
            choices[event.choice].add(event)
        stats.append(engine.stats())
    assert [(one.num_blocks_used, one.num_copies) for one in stats[:2]] == [(32, 0), (31 + 8, 7)]
    assert stats[-1].num_prompt_tokens_computed == 505
    other = start()  # each by itself, but for the prompt's blocks
    alone = [run(other, [prompt], replace(params, n=1, seed=choice_seed(4, j)))[0] for j in range(8)]
    assert tokens_of(choices) == tokens_of(alone)
    decode = Tokenizer.from_files(path).decode
    assert len({decode(answer.token_ids) for answer in choices}) == 8
