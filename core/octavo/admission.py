"""What an engine is and which requests it can take: known to the API process without importing torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams

_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(slots=True, kw_only=True)
class EngineInfo:
    """Facts of a started engine.

    `layers` has for each linear layer its weight, its matmul, its bytes, and why it was dequantized if it was.
    `kv_scales` says where the KV cache's scales come from, empty where it has none.
    `memory` maps what takes memory to its planned bytes, `memory_measured` to what it took; `startup_seconds` maps each
    phase of the start to its time.
    """

    model: str
    max_model_len: int
    vocab_size: int
    max_requests: int = 1
    num_blocks: int = 0
    block_size: int = 0
    kv_bytes_per_token: float = 0.0
    kv_scales: str = ""
    dtype: str = ""
    device: str = ""
    backends: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    memory_measured: dict[str, int] = field(default_factory=dict)
    startup_seconds: dict[str, float] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a model's generation_config.json sets, under SamplingParams' names."""
    return {name: generation_config[name] for name in _GENERATION_FIELDS if generation_config.get(name) is not None}


def check_request(
    prompt_token_ids: list[int], params: SamplingParams, *, max_model_len: int, vocab_size: int, max_logprobs: int
) -> None:
    """Refuse what the engine could not serve, before anything is queued. Raises RequestError with the field."""
    _check_length(len(prompt_token_ids), params.max_tokens, max_model_len)
    _check_ids("prompt", prompt_token_ids, vocab_size)
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    for name, number in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if number is not None and number > max_logprobs:
            raise RequestError(f"{name} is {number}, but at most {max_logprobs} are given.", name)


def _check_length(num_prompt: int, max_tokens: int | None, limit: int) -> None:
    if num_prompt == 0:
        raise RequestError("The prompt is empty, but must hold at least one token.", "prompt")
    if num_prompt >= limit:
        raise RequestError(
            f"The prompt has {num_prompt} tokens, but the model's context of {limit} must hold it and one more.",
            "prompt",
        )
    if max_tokens is not None and num_prompt + max_tokens > limit:
        raise RequestError(
            f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together {num_prompt + max_tokens}, "
            f"but the model's context is {limit}.",
            "max_tokens",
        )


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    bad = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise RequestError(f"{name} holds token id {bad}, but ids are from 0 to {vocab_size - 1}.", name)
