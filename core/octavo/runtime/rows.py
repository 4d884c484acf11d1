"""What the runner knows of each row: its known tokens, sampling and penalty counts."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from octavo.engine.step import ForkRow, NewRow
from octavo.runtime.transfer import to_device
from octavo.sampling_params import SamplingParams, choice_seed

PENALTY_BYTES = 5
"""Bytes that a row's penalty counts take for each token of the vocabulary."""


@dataclass(slots=True)
class PenaltyCounts:
    """How often each token was generated [V] int32, and which are in the prompt [V] bool."""

    generated: torch.Tensor
    prompt: torch.Tensor

    def copy(self) -> "PenaltyCounts":
        """Counts of a fork."""
        return PenaltyCounts(self.generated.clone(), self.prompt)


@dataclass(slots=True)
class Row:
    """A request in its row. Positions at or past len(token_ids) hold tokens that the device sampled."""

    token_ids: npt.NDArray[np.int32]
    num_prompt: int
    params: SamplingParams
    request_seed: int
    seed: int
    counts: PenaltyCounts | None = None
    masked: list[int] = field(default_factory=list)
    plain: bool = False
    """Whether its token is simply the likeliest one, and nothing more is asked of it."""

    @classmethod
    def start(cls, new: NewRow, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device) -> "Row":
        """The row of a new or resumed request."""
        params = new.params
        row = cls(
            np.array(new.token_ids, dtype=np.int32),
            new.num_prompt_tokens,
            params,
            new.seed,
            choice_seed(new.seed, new.choice),
        )
        if params.min_tokens:
            row.masked = sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})
        if needs_counts(params):
            row.counts = _count(row, vocab_size, device)
        row.plain = not row.masked and row.counts is None and _is_plain(params)
        return row

    def fork(self, fork: ForkRow) -> "Row":
        """Another choice that goes on from here."""
        counts = self.counts.copy() if self.counts is not None else None
        seed = choice_seed(self.request_seed, fork.choice)
        return Row(
            self.token_ids,
            self.num_prompt,
            self.params,
            self.request_seed,
            seed,
            counts,
            self.masked,
            self.plain,
        )

    def num_generated(self, position: int) -> int:
        """Tokens generated before `position`."""
        return position - self.num_prompt


class RowTable:
    """The rows in use, and what a step asks of every one: `num_known` tokens and whether it is `plain`, both [rows].

    `telling` are those whose prompt's logprobs are asked for.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_known = np.zeros(num_rows, dtype=np.int32)
        self.plain = np.zeros(num_rows, dtype=np.bool_)
        self.telling: set[int] = set()
        self._rows: list[Row | None] = [None] * num_rows

    def __getitem__(self, index: int) -> Row:
        """The row `index`, which is in use."""
        row = self._rows[index]
        assert row is not None, f"row {index} is in nobody's use"
        return row

    def put(self, index: int, row: Row) -> None:
        """Row `index` is now this one."""
        self.drop(index)
        self._rows[index] = row
        self.num_known[index] = len(row.token_ids)
        self.plain[index] = row.plain
        if row.params.prompt_logprobs is not None:
            self.telling.add(index)

    def drop(self, index: int) -> None:
        """Row `index` is in use no longer."""
        self._rows[index] = None
        self.telling.discard(index)


def _is_plain(params: SamplingParams) -> bool:
    return params.greedy and params.logprobs is None and not params.logit_bias and params.allowed_token_ids is None


def needs_counts(params: SamplingParams) -> bool:
    """Whether any penalty is on."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _count(row: Row, vocab_size: int, device: torch.device) -> PenaltyCounts:
    tokens = to_device(row.token_ids, device).long()
    output = tokens[row.num_prompt :]
    generated = torch.zeros(vocab_size, dtype=torch.int32, device=device)
    generated.scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
    prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    prompt.index_fill_(0, tokens[: row.num_prompt], True)
    return PenaltyCounts(generated, prompt)
