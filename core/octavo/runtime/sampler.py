"""The sampler: logits to tokens. A row's token depends on its own logits, parameters, seed and position only.

Nothing here waits for a GPU: what the host must know is under way when `sample` returns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from octavo.engine.step import TokenLogprob
from octavo.runtime.rows import Row
from octavo.runtime.transfer import Arrival, ints_to_device, to_device
from octavo.sampling_params import uniform

_NUCLEUS = 1024  # tokens among which the nucleus is looked for first


class Logprobs:
    """Logprobs on their way to the host."""

    def __init__(self, asked: Sequence[int | None], wanted: Sequence[int], arrival: Arrival) -> None:
        self._asked, self._wanted, self._arrival = asked, wanted, arrival

    def wait(self) -> list[TokenLogprob | None]:
        """Each row's, None where it asked for none."""
        result: list[TokenLogprob | None] = [None] * len(self._asked)
        own, ranks, ids, values = (tensor.tolist() for tensor in self._arrival.tensors())
        for j, i in enumerate(self._wanted):
            number = self._asked[i] or 0
            result[i] = TokenLogprob(own[j], ranks[j], ids[j][:number], values[j][:number])
        return result


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens [S] int64 on the device, and the rows' logprobs where any asked for them."""

    token_ids: torch.Tensor
    logprobs: Logprobs | None


def sample(logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int]) -> Sampled:
    """A token for each of `rows` from logits [S, V]; `positions` are the places of the tokens to be sampled."""
    edited = _edit(logits, rows, positions)
    token_ids = edited.max(dim=-1).indices  # argmax is several times slower on a CPU in bfloat16
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        index = ints_to_device(drawn, logits.device)
        chosen = _draw(edited[index].float(), [rows[i] for i in drawn], [positions[i] for i in drawn])
        token_ids.index_copy_(0, index, chosen)
    _add_to_counts(rows, token_ids)
    asked = [row.params.logprobs for row in rows]
    return Sampled(token_ids, token_logprobs(logits, token_ids, asked))


def _edit(logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int]) -> torch.Tensor:
    """Logits after bias, penalties and masks; a copy if any row has them."""
    edits = [i for i, row in enumerate(rows) if _is_edited(row, positions[i])]
    if not edits:
        return logits
    edited = logits.to(torch.float32, copy=True)
    for i in edits:
        _edit_row(edited[i], rows[i], positions[i])
    return edited


def _is_edited(row: Row, position: int) -> bool:
    params = row.params
    masked = row.masked and row.num_generated(position) < params.min_tokens
    return bool(masked or row.counts or params.logit_bias or params.allowed_token_ids)


def _edit_row(logits: torch.Tensor, row: Row, position: int) -> None:
    """Change one row's logits [V] in place."""
    params = row.params
    if row.counts is not None:
        _penalise(logits, row)
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if params.allowed_token_ids is not None:
        allowed = ints_to_device(list(params.allowed_token_ids), logits.device)
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept
    if row.masked and row.num_generated(position) < params.min_tokens:
        logits.index_fill_(0, ints_to_device(row.masked, logits.device), float("-inf"))


def _penalise(logits: torch.Tensor, row: Row) -> None:
    """Repetition penalty (Keskar et al. 2019, §4.1) over prompt and output; presence and frequency over the output."""
    assert row.counts is not None
    params, generated = row.params, row.counts.generated
    if params.repetition_penalty != 1.0:
        seen = row.counts.prompt | (generated > 0)
        penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits.copy_(torch.where(seen, penalised, logits))
    logits -= params.frequency_penalty * generated
    logits -= params.presence_penalty * (generated > 0)


def _draw(logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int]) -> torch.Tensor:
    """A token of each row [S] by inverting the cumulative distribution at the row's random number."""
    device = logits.device

    def column(values: list[float], dtype: type[np.floating]) -> torch.Tensor:
        return to_device(np.array(values, dtype=dtype), device).unsqueeze(-1)

    logits = logits / column([row.params.temperature for row in rows], np.float32)
    for i, row in enumerate(rows):
        _filter(logits[i], row.params.min_p, row.params.top_k, row.params.top_p)
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    numbers = [uniform(row.seed, position) for row, position in zip(rows, positions, strict=True)]
    targets = column(numbers, np.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _filter(logits: torch.Tensor, min_p: float, top_k: int, top_p: float) -> None:
    """Set the logits [V] of tokens that may not be drawn to -inf, in place."""
    lowest = float("-inf")
    if min_p > 0.0:
        # p >= min_p * max p, in logarithms.
        logits.masked_fill_(logits < logits.max() + math.log(min_p), lowest)
    if 0 < top_k < logits.shape[-1]:
        logits.masked_fill_(logits < logits.topk(top_k).values[-1], lowest)
    if top_p < 1.0:
        order, kept = _nucleus(logits, top_p)
        logits.copy_(torch.full_like(logits, lowest).index_copy_(0, order, logits[order].masked_fill(~kept, lowest)))


def _nucleus(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020, §3.1): ids, and which are in.

    On a CPU the likeliest are looked at first, since a full sort takes many times as long; asking a GPU whether they
    were enough would.
    """
    probabilities = torch.softmax(logits, dim=-1)
    few = not logits.is_cuda
    values, order = probabilities.topk(min(_NUCLEUS, len(logits))) if few else probabilities.sort(descending=True)
    if few and values.sum() < top_p:
        values, order = probabilities.sort(descending=True)
    return order, values.cumsum(dim=-1) - values < top_p


def _add_to_counts(rows: Sequence[Row], token_ids: torch.Tensor) -> None:
    for i, row in enumerate(rows):
        if row.counts is not None:
            token = token_ids[i : i + 1]
            row.counts.generated.scatter_add_(0, token, torch.ones_like(token, dtype=torch.int32))


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, asked: Sequence[int | None]) -> Logprobs | None:
    """Logprobs of the model's own distribution: of token i in row i of logits [S, V], and the `asked[i]` likeliest."""
    wanted = [i for i, number in enumerate(asked) if number is not None]
    if not wanted:
        return None
    if len(wanted) < len(asked):
        index = ints_to_device(wanted, logits.device)
        logits, token_ids = logits[index], token_ids[index]
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > own).sum(dim=1) + 1
    top = logprobs.topk(max(asked[i] or 0 for i in wanted), dim=1)
    return Logprobs(asked, wanted, Arrival(own.squeeze(1), ranks, top.indices, top.values))
