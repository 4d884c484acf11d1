"""A request as the scheduler sees it: one choice, its tokens, and how far they are computed."""

from dataclasses import dataclass, field, replace
from enum import Enum

from octavo.engine.block_manager import chain_hash
from octavo.sampling_params import SamplingParams


class Status(Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One choice of a user's request.

    `num_computed` tokens have their KV computed by submitted steps; `num_in_flight` tokens are sampled by submitted
    steps whose output is not back. While `num_computed` is below `steady_end` it decodes, one token a step, in blocks
    that it has. `stops` are the tokens that may end it. `choices` is the number of choices that fork off at the end of
    the prompt (1 = none). `shared_step` is the step in which it last began on blocks that others fill (a prefix hit, a
    fork), -1 if on none.
    """

    id: str
    key: int
    prompt_token_ids: list[int]
    params: SamplingParams
    max_output_tokens: int
    seed: int
    choice: int = 0
    choices: int = 1
    priority: int = 0
    arrival: int = 0
    cache_salt: str = ""
    sync: bool = False
    stops: frozenset[int] = frozenset()

    status: Status = Status.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_in_flight: int = 0
    steady_end: int = 0
    num_cached: int | None = None
    row: int = -1
    spare_rows: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_prompt_logprobs: int = 0
    last_step: int = -1
    shared_step: int = -1

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """All tokens, those on their way too."""
        return self.num_known + self.num_in_flight

    @property
    def num_wanted(self) -> int:
        """Tokens to compute now: 0 once all output tokens are sampled or on their way."""
        num_output = len(self.output_token_ids) + self.num_in_flight
        if num_output >= self.max_output_tokens or (self.sync and self.num_in_flight):
            return 0
        return len(self.prompt_token_ids) + num_output - self.num_computed

    @property
    def last_computed(self) -> int:
        """How many of its tokens are ever computed, if no stop comes: all but the last."""
        return len(self.prompt_token_ids) + self.max_output_tokens - 1

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.status is Status.FINISHED

    def known_token_ids(self) -> list[int]:
        """The prompt and what was generated."""
        return self.prompt_token_ids + self.output_token_ids

    def extend_hashes(self, block_size: int) -> None:
        """Hash the blocks that known tokens have filled since the last call."""
        num_full = self.num_known // block_size
        if len(self.hashes) >= num_full:
            return
        start = len(self.hashes) * block_size
        tokens = self._slice(start, num_full * block_size)
        parent = self.hashes[-1] if self.hashes else b""
        for offset in range(0, len(tokens), block_size):
            parent = chain_hash(parent, tokens[offset : offset + block_size], self.cache_salt)
            self.hashes.append(parent)

    def _slice(self, start: int, end: int) -> list[int]:
        prompt = self.prompt_token_ids
        if start >= len(prompt):
            return self.output_token_ids[start - len(prompt) : end - len(prompt)]
        return prompt[start:end] + self.output_token_ids[: max(0, end - len(prompt))]

    def fork(self, key: int, choice: int, row: int) -> "Request":
        """Another choice of the same prompt, at the same point, in a row of its own."""
        return replace(
            self,
            key=key,
            choice=choice,
            choices=1,
            row=row,
            spare_rows=[],
            output_token_ids=[],
            num_in_flight=0,
            steady_end=0,
            hashes=list(self.hashes),
            num_prompt_logprobs=0,
            shared_step=self.last_step,
        )

    def stop_reason(self, token_id: int, eos_token_ids: frozenset[int]) -> tuple[str, int | None] | None:
        """(finish reason, stop token) if the output, which ends in `token_id`, is complete."""
        num_output, params = len(self.output_token_ids), self.params
        if num_output >= params.min_tokens:
            if token_id in eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token_id in params.stop_token_ids:
                return "stop", token_id
        return ("length", None) if num_output >= self.max_output_tokens else None
