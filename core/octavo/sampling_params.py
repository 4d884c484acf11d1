"""What a request asks of the sampler, under vLLM's argument names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from octavo.errors import RequestError

_MASK = (1 << 64) - 1
MAX_STOP_STRINGS = 16
MAX_CHOICES = 128


def _mix(x: int) -> int:
    """A 64-bit finaliser: every input bit reaches every output bit (splitmix64, Steele et al. 2014, fig. 13)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice j: the request's own for 0, so a run with `choice_seed(s, j)` repeats choice j of seed s."""
    return seed if choice == 0 else _mix(_mix(seed & _MASK) ^ choice) >> 1


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that decides the token at `position` of a request or choice with this seed."""
    return (_mix(_mix(seed & _MASK) ^ (position * 0xD6E8FEB86659FD93 & _MASK)) >> 11) * 2.0**-53


def _check_range(name: str, value: float, low: float, high: float, place: str = "") -> None:
    """Raise RequestError for the field `name` (at `place` in it) unless `value` lies between the bounds."""
    if not isfinite(value) or not low <= value <= high:
        raise RequestError(f"{name}{place} is {value}, but must be from {low:g} to {high:g}.", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one request. Every default has no effect, except `max_tokens` = 16.

    Raises RequestError, with the field's name, for a value out of range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_counts()
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 100.0)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0, but must be above 0 and at most 1.", "top_p")
        for token, bias in self.logit_bias.items():
            _check_range("logit_bias", bias, -100.0, 100.0, f"[{token}]")

    def _normalise(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "top_k", max(self.top_k, 0))  # -1 is another spelling of "off"

    def _check_counts(self) -> None:
        _check_range("n", self.n, 1, MAX_CHOICES)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}, but must be at least 1.", "max_tokens")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise RequestError(
                f"min_tokens is {self.min_tokens}, but must be from 0 to max_tokens ({self.max_tokens}).",
                "min_tokens",
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            message = f"stop has {len(self.stop)} strings, but at most {MAX_STOP_STRINGS} are allowed."
            raise RequestError(message, "stop")
        if any(not s for s in self.stop):
            raise RequestError("stop holds an empty string, which would end every text at once.", "stop")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise RequestError(f"{name} is {value}, but must not be negative.", name)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty, so that no token could be sampled.", "allowed_token_ids")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken (temperature 0)."""
        return self.temperature == 0.0
