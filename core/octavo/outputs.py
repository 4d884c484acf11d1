"""What a finished request gives back."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural-log probability, its rank among all tokens (1 = most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Logprobs at one position, by token id: the sampled token first, then the most likely ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request. `finish_reason` is "stop", "length", "abort" or "error"."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request with all its choices, in the order of their index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False
