"""The sampler: logits to tokens. A row's token depends on its own logits, parameters, seed and position only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.engine.step import TokenLogprob
from octavo.runtime.rows import Row
from octavo.sampling_params import uniform

_NUCLEUS = 1024  # tokens among which the nucleus is looked for first


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens [S] int64 on the device, and each row's logprobs where it asked for them."""

    token_ids: torch.Tensor
    logprobs: list[TokenLogprob | None]


def sample(logits: torch.Tensor, rows: Sequence[Row], positions: Sequence[int]) -> Sampled:
    """A token for each of `rows` from logits [S, V]; `positions` are the places of the tokens to be sampled."""
    edited = _edit(logits, rows, positions)
    token_ids = edited.max(dim=-1).indices  # argmax is several times slower on a CPU in bfloat16
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        chosen = _draw(edited[index].float(), [rows[i] for i in drawn], [positions[i] for i in drawn])
        token_ids[index] = chosen
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
        allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
        kept = logits[allowed]
        logits.fill_(float("-inf"))
        logits[allowed] = kept
    if row.masked and row.num_generated(position) < params.min_tokens:
        logits[torch.tensor(row.masked, device=logits.device)] = float("-inf")


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
    temperatures = torch.tensor([row.params.temperature for row in rows], device=device)
    logits = logits / temperatures.unsqueeze(-1)
    for i, row in enumerate(rows):
        _filter(logits[i], row.params.min_p, row.params.top_k, row.params.top_p)
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    numbers = [uniform(row.seed, position) for row, position in zip(rows, positions, strict=True)]
    targets = torch.tensor(numbers, dtype=torch.float64, device=device).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _filter(logits: torch.Tensor, min_p: float, top_k: int, top_p: float) -> None:
    """Set the logits [V] of tokens that may not be drawn to -inf, in place."""
    lowest = float("-inf")
    if min_p > 0.0:
        # p >= min_p * max p, in logarithms.
        logits.masked_fill_(logits < logits.max() + torch.tensor(min_p).log().item(), lowest)
    if 0 < top_k < logits.shape[-1]:
        logits.masked_fill_(logits < logits.topk(top_k).values[-1], lowest)
    if top_p < 1.0:
        kept = _nucleus(logits, top_p)
        values = logits[kept]
        logits.fill_(lowest)[kept] = values


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set of tokens whose probability reaches top_p (Holtzman et al. 2020, §3.1), by id."""
    probabilities = torch.softmax(logits, dim=-1)
    values, order = probabilities.topk(min(_NUCLEUS, len(logits)))
    if values.sum() < top_p:  # rare, and a full sort takes many times as long
        values, order = probabilities.sort(descending=True)
    return order[values.cumsum(dim=-1) - values < top_p]


def _add_to_counts(rows: Sequence[Row], token_ids: torch.Tensor) -> None:
    for i, row in enumerate(rows):
        if row.counts is not None:
            row.counts.generated[token_ids[i]] += 1


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, asked: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Logprobs of the model's own distribution: of token i in row i of logits [S, V], and the `asked[i]` likeliest."""
    wanted = [i for i, number in enumerate(asked) if number is not None]
    result: list[TokenLogprob | None] = [None] * len(asked)
    if not wanted:
        return result
    index = torch.tensor(wanted, device=logits.device)
    logprobs = torch.log_softmax(logits[index].float(), dim=-1)
    own = logprobs.gather(1, token_ids[index].unsqueeze(1))
    ranks = (logprobs > own).sum(dim=1) + 1
    most = max(asked[i] or 0 for i in wanted)
    top = logprobs.topk(most, dim=1) if most else None
    for j, i in enumerate(wanted):
        number = asked[i] or 0
        ids = top.indices[j, :number].tolist() if top else []
        values = top.values[j, :number].tolist() if top else []
        result[i] = TokenLogprob(own[j].item(), int(ranks[j].item()), ids, values)
    return result
