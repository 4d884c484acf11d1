"""Engines with 8-bit KV caches: sizes, the laws that hold in the plain one, what is clipped, who may read them."""

from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from octavo.engine.loop import Engine
from octavo.engine.step import EngineStats
from octavo.errors import PluginError
from octavo.kv_cache.scales import write_scales
from octavo.sampling_params import SamplingParams
from octavo.start import start_engine
from safetensors.torch import load_file, save_file
from test_kv_scales import begin, scales_of
from tiny_models import GREEDY, MAX_MODEL_LEN, NUM_TOKENS, Reference, make_reference, run, run_choices, start, tokens_of

FORMATS = ("fp8", "fp8_e5m2", "int8")
FACTOR = 1000.0


def values_of(num_tokens: int) -> int:
    """Keys and values of a tiny model's tokens: 2 layers of 2 heads of 16."""
    return 2 * 2 * 2 * 16 * num_tokens


def answers(path: Path, cache: Path, prompts: Sequence[list[int]], dtype: str, **options: Any) -> list[list[int]]:
    engine, _ = begin(path, cache, dtype, **options)
    found = tokens_of(run(engine, prompts, GREEDY))
    engine.shutdown()
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where scales are kept, so that each format is calibrated once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("dtype", FORMATS)
def test_twice_the_blocks_in_the_same_bytes(llama: Reference, cache: Path, dtype: str) -> None:
    from octavo.config import EngineConfig

    common = {"model": str(llama.path), "dtype": "bfloat16", "max_model_len": 192, "plugins": (), "progress": False}
    infos = []
    for kv in ("auto", dtype):
        config = common | {"kv_cache_dtype": kv, "kv_cache_memory_bytes": 1 << 20, "download_dir": str(cache)}
        engine, info = start_engine(EngineConfig.from_kwargs(**config))
        engine.shutdown()
        infos.append(info)
    plain, coded = infos
    assert plain.kv_bytes_per_token == 2 * coded.kv_bytes_per_token == 2 * values_of(1)
    assert coded.num_blocks == 2 * plain.num_blocks
    assert coded.memory["KV cache"] == plain.memory["KV cache"]


@pytest.mark.parametrize("dtype", FORMATS)
def test_alone_together_in_chunks_preempted_and_cached(llama: Reference, cache: Path, dtype: str) -> None:
    """What is written is a function of a key alone, and all that is read comes from the cache."""
    engine, _ = begin(llama.path, cache, dtype)
    file = cache / f"{dtype}.json"  # an engine of short steps would be calibrated with short prompts
    write_scales(file, dtype, scales_of(engine))
    together = tokens_of(run(engine, llama.prompts, GREEDY))
    engine.shutdown()
    assert all(len(tokens) == NUM_TOKENS for tokens in together)
    engine, _ = begin(llama.path, cache, dtype)
    alone = [run(engine, [prompt], GREEDY)[0].token_ids for prompt in llama.prompts]  # prefixes are found again
    assert engine.stats().num_cached_tokens > 0
    engine.shutdown()
    assert alone == together
    chunked = {"max_num_batched_tokens": 23, "max_num_seqs": 8, "block_size": 8, "kv_scales": str(file)}
    assert answers(llama.path, cache, llama.prompts, dtype, **chunked) == together
    few = MAX_MODEL_LEN // 16 + 10
    engine, _ = begin(llama.path, cache, dtype, num_gpu_blocks_override=few)
    preempted = tokens_of(run(engine, llama.prompts, GREEDY))
    assert engine.stats().num_preemptions > 0 and preempted == together
    engine.shutdown()


def test_close_to_the_plain_cache(llama: Reference, cache: Path) -> None:
    """In the tokens' logprobs: the prompts', which every format sees alike."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = {}
    for dtype in ("auto", *FORMATS):
        engine, _ = begin(llama.path, cache, dtype)
        parts = [one.logprob for answer in run(engine, llama.prompts[4:], params) for one in answer.prompt_logprobs]
        found[dtype] = torch.tensor(parts)
        engine.shutdown()
    errors = {dtype: (found[dtype] - found["auto"]).abs().mean().item() for dtype in FORMATS}
    assert 0 < errors["int8"] < errors["fp8"] < errors["fp8_e5m2"] < 0.5, errors


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-two-groups", "qwen3"])
def test_windows_groups_and_norms(name: str, tmp_path: Path, cache: Path) -> None:
    reference = make_reference(name, tmp_path / "model")
    prompts = reference.prompts[::3]
    together = answers(reference.path, cache, prompts, "fp8")
    alone = [answers(reference.path, cache, [p], "fp8", long_prefill_token_threshold=37)[0] for p in prompts[-2:]]
    assert alone == together[-2:]


def test_choices_fork_and_copy_blocks(llama: Reference, cache: Path) -> None:
    engine, _ = begin(llama.path, cache, "int8")
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=20, ignore_eos=True)
    choices = run_choices(engine, llama.prompts[5:7], params)
    assert engine.stats().num_copies > 0
    engine.shutdown()
    engine, _ = begin(llama.path, cache, "int8", enable_prefix_caching=False, long_prefill_token_threshold=7)
    again = run_choices(engine, llama.prompts[5:7], params)
    engine.shutdown()
    assert [tokens_of(one) for one in choices] == [tokens_of(one) for one in again]


def test_written_values_are_counted(llama: Reference, cache: Path) -> None:
    """All tokens but the last sampled one, which nobody has written."""
    engine, _ = begin(llama.path, cache)
    run(engine, [llama.prompts[5]], SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True))
    stats = engine.stats()
    assert (stats.num_kv_clipped, stats.num_kv_written) == (0, values_of(len(llama.prompts[5]) + 6))
    engine.shutdown()


@pytest.fixture(scope="module")
def large_keys(llama: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but for keys that are 1,000 times as large as queries are small."""
    directory = copytree(llama.path, tmp_path_factory.mktemp("large") / "model")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if "k_proj" in name:
            tensor *= FACTOR
        elif "q_proj" in name:
            tensor /= FACTOR
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _ran(engine: Engine, prompts: Sequence[list[int]]) -> tuple[list[list[int]], EngineStats]:
    found, stats = tokens_of(run(engine, prompts, GREEDY)), engine.stats()
    engine.shutdown()
    return found, stats


@pytest.mark.parametrize("dtype", ["fp8", "int8"])
def test_unit_scales_clip_large_keys_and_calibrated_ones_do_not(
    large_keys: Path, llama: Reference, cache: Path, dtype: str
) -> None:
    prompts = llama.prompts[:8]
    usual = answers(llama.path, cache, prompts, dtype)
    found, stats = _ran(begin(large_keys, cache, dtype)[0], prompts)
    assert stats.num_kv_clipped == 0 < stats.num_kv_written
    assert found == usual  # a key's code is the same, whatever the scale of all keys
    found, stats = _ran(begin(large_keys, cache, dtype, kv_scales="unit")[0], prompts)
    assert 0.2 < stats.num_kv_clipped / stats.num_kv_written <= 0.5  # keys are half of all
    assert found != usual


def test_backends_that_read_plain_pages_say_so(llama: Reference, cache: Path) -> None:
    with pytest.raises(PluginError, match=r"native: it reads the KV layouts plain, not fp8\."):
        begin(llama.path, cache, attention_backend="native")


def test_an_unknown_format_lists_the_known_ones(llama: Reference) -> None:
    with pytest.raises(Exception, match="fp8_e5m2"):
        start(llama.path, kv_cache_dtype="fp9")
