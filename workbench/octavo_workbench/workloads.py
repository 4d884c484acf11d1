"""What the benchmarks run: token ids and output lengths, no text, so that one name is the same work everywhere."""

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from octavo.errors import ConfigError
from octavo.plugins.values import nearest


class Job(NamedTuple):
    """One request: its prompt, and the number of tokens to generate."""

    prompt_token_ids: list[int]
    num_output_tokens: int


LONGEST_PROMPT = 1024
LONGEST_OUTPUT = 1024
"""The most tokens that `sharegpt_like` has in a prompt and in an answer."""

_FIRST_ID = 10  # ids below are special tokens in many vocabularies


def sharegpt_like(num_requests: int = 512, seed: int = 0, vocab_size: int = 30_000) -> list[Job]:
    """Prompts and answers of log-normal length, about as long as ShareGPT's (means of 197 and 189 tokens)."""
    rng = random.Random(seed)
    jobs = []
    for _ in range(num_requests):
        prompt = _log_normal(rng, 4.9, LONGEST_PROMPT)
        output = _log_normal(rng, 4.8, LONGEST_OUTPUT)
        jobs.append(Job(_token_ids(rng, prompt, vocab_size), output))
    return jobs


def fixed(
    num_requests: int, num_prompt_tokens: int, num_output_tokens: int, seed: int = 1, vocab_size: int = 30_000
) -> list[Job]:
    """Requests of one length."""
    rng = random.Random(seed)
    prompts = (_token_ids(rng, num_prompt_tokens, vocab_size) for _ in range(num_requests))
    return [Job(prompt, num_output_tokens) for prompt in prompts]


def _log_normal(rng: random.Random, mean_of_log: float, longest: int) -> int:
    return min(longest, max(4, int(rng.lognormvariate(mean_of_log, 1.0))))


def _token_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(_FIRST_ID, vocab_size) for _ in range(count)]


WORKLOADS: Mapping[str, Callable[[], list[Job]]] = {
    "sharegpt512": lambda: sharegpt_like(512),
    "decode_b1": lambda: fixed(1, 128, 256, seed=11),
    "decode_b32": lambda: fixed(32, 512, 256, seed=12),
    "decode_b256": lambda: fixed(256, 512, 256, seed=13),
    "prefill_8k": lambda: fixed(16, 8192, 4, seed=14),
}


def workload(name: str) -> list[Job]:
    """The jobs of a name in WORKLOADS, or of `REQUESTSxINxOUT`, such as 8x128x128. Raises ConfigError."""
    if name in WORKLOADS:
        return WORKLOADS[name]()
    sizes = name.split("x")
    if len(sizes) == 3 and all(size.isdecimal() and int(size) > 0 for size in sizes):
        return fixed(*map(int, sizes))
    raise ConfigError(
        f"There is no workload {name!r}: known are {', '.join(WORKLOADS)}, and REQUESTSxINxOUT, such as 8x128x128 "
        f"for 8 requests of 128 tokens in and 128 out.{nearest(name, WORKLOADS)}"
    )


LLAMA_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""The config.json of a model of Llama-3.1-8B's shape."""

TINY: Mapping[str, Any] = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 30_000,
    "max_position_embeddings": LONGEST_PROMPT + LONGEST_OUTPUT,
    "rope_scaling": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
"""The config.json of a model that costs next to nothing to run, for what does not depend on the model."""

SHAPES: Mapping[str, Mapping[str, Any]] = {"llama-8b": LLAMA_8B, "tiny": TINY}


@contextmanager
def model_of_shape(shape: Mapping[str, Any]) -> Iterator[str]:
    """A temporary directory with nothing but that config.json, to be run with `load_format="dummy"`."""
    with tempfile.TemporaryDirectory(prefix="octavo-shape-") as folder:
        Path(folder, "config.json").write_text(json.dumps(shape), encoding="utf-8")
        yield folder
