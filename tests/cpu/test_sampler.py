"""The sampler against a plain oracle on random logits: one parameter at a time, then many together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from octavo.engine.step import ForkRow, NewRow, TokenLogprob
from octavo.runtime.rows import Row
from octavo.runtime.sampler import Sampled, _nucleus, sample
from octavo.sampling_params import SamplingParams, choice_seed, uniform

VOCAB_SIZE = 200
EOS = 7
PROMPT = [3, 5, 5, 11, 190, 42]
OUTPUT = [11, 60, 60, 60, 8]
POSITION = len(PROMPT) + len(OUTPUT)

Floats = npt.NDArray[np.float64]


def row_of(seed: int = 0, choice: int = 0, output: Sequence[int] = OUTPUT, **params: Any) -> Row:
    """A row that has generated `output` after PROMPT."""
    known = [*PROMPT, *output]
    new = NewRow(0, known, len(PROMPT), [[]], SamplingParams(**params), seed, choice)
    return Row.start(new, VOCAB_SIZE, frozenset({EOS}), torch.device("cpu"))


def waited(sampled: Sampled) -> list[TokenLogprob | None]:
    assert sampled.logprobs is not None
    return sampled.logprobs.wait()


def random_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def oracle_logits(logits: Floats, params: SamplingParams, output: Sequence[int]) -> Floats:
    """Bias, penalties and masks, token by token."""
    result = logits.copy()
    for token in range(VOCAB_SIZE):
        count = list(output).count(token)
        if count or token in PROMPT:
            result[token] *= params.repetition_penalty if result[token] <= 0 else 1 / params.repetition_penalty
        result[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        result[token] += params.logit_bias.get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result[token] = -np.inf
    if len(output) < params.min_tokens:
        result[[*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]] = -np.inf
    return result


def softmax(logits: Floats) -> Floats:
    weights: Floats = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


def oracle_probabilities(logits: Floats, params: SamplingParams, output: Sequence[int] = OUTPUT) -> Floats:
    """Each token's probability, by the definitions of temperature, min_p, top_k and top_p, in that order."""
    p = softmax(oracle_logits(logits, params, output) / params.temperature)
    p[p < params.min_p * p.max()] = 0.0
    if params.top_k:
        p[np.argsort(-p)[params.top_k :]] = 0.0
    p /= p.sum()
    kept, total = [], 0.0
    for token in np.argsort(-p):
        kept.append(token)
        total += p[token]
        if total >= params.top_p:
            break
    result = np.zeros_like(p)
    result[kept] = p[kept]
    result /= result.sum()
    return result


PARAMS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature-low": {"temperature": 0.3},
    "temperature-high": {"temperature": 2.5},
    "top_k": {"top_k": 5},
    "top_k-1": {"top_k": 1},
    "top_k-beyond": {"top_k": 10_000},
    "top_p": {"top_p": 0.6},
    "top_p-tiny": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p-1": {"min_p": 1.0},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -1.5},
    "repetition": {"repetition_penalty": 2.0},
    "repetition-below-1": {"repetition_penalty": 0.5},
    "bias": {"logit_bias": {9: 8.0, 17: -100.0, 60: 3.5}},
    "allowed": {"allowed_token_ids": (4, 60, 199)},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": (12, 60)},
    "min_tokens-reached": {"min_tokens": 5, "stop_token_ids": (12, 60)},
    "min_tokens-reached-bias": {"min_tokens": 5, "stop_token_ids": (12,), "logit_bias": {12: 4.0, EOS: 4.0}},
    "min_tokens-ignore_eos": {"min_tokens": 6, "ignore_eos": True},
    "all": {
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {9: 4.0},
        "min_tokens": 9,
        "allowed_token_ids": tuple(range(150)),
    },
}


@pytest.mark.parametrize("name", PARAMS)
def test_draws_the_oracles_token(name: str) -> None:
    """The token is where the oracle's cumulative distribution passes the row's random number."""
    logits = random_logits(300)
    rows = [row_of(seed=i, **PARAMS[name]) for i in range(300)]
    tokens = sample(logits.clone(), rows, [POSITION] * 300).token_ids.tolist()
    expected = []
    for i, row in enumerate(rows):
        p = oracle_probabilities(logits[i].double().numpy(), row.params)
        expected.append(int(np.searchsorted(p.cumsum(), uniform(i, POSITION), side="right")))
    assert tokens == expected
    assert len(set(tokens)) > 2


@pytest.mark.parametrize("name", [name for name, params in PARAMS.items() if "temperature" not in params])
def test_greedy_takes_the_oracles_best(name: str) -> None:
    logits = random_logits(50)
    rows = [row_of(seed=i, temperature=0.0, **PARAMS[name]) for i in range(50)]
    tokens = sample(logits.clone(), rows, [POSITION] * 50).token_ids.tolist()
    best = [oracle_logits(logits[i].double().numpy(), row.params, OUTPUT).argmax() for i, row in enumerate(rows)]
    assert tokens == [int(token) for token in best]


@pytest.mark.parametrize("name", ["nothing", "temperature-low", "top_k", "top_p", "min_p"])
def test_distribution_of_20000_draws(name: str) -> None:
    """Chi-square over the tokens, those expected fewer than 5 times taken together."""
    num_draws, chunk = 20_000, 2_000
    logits = random_logits(1, seed=5)
    p = oracle_probabilities(logits[0].double().numpy(), row_of(**PARAMS[name]).params)
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    for begin in range(0, num_draws, chunk):
        # As in use: 400 seeds of 50 positions.
        rows = [row_of(seed=(begin + i) // 50, **PARAMS[name]) for i in range(chunk)]
        tokens = sample(logits.expand(chunk, -1), rows, [POSITION + i % 50 for i in range(chunk)]).token_ids
        counts += torch.bincount(tokens, minlength=VOCAB_SIZE)
    assert counts[torch.from_numpy(p == 0)].sum() == 0
    expected = torch.from_numpy(p) * num_draws
    rare = expected < 5
    cells = torch.cat((expected[~rare], expected[rare].sum(0, keepdim=True)))
    seen = torch.cat((counts[~rare], counts[rare].sum(0, keepdim=True)))
    cells, seen = cells[cells > 0], seen[cells > 0]
    statistic = ((seen - cells) ** 2 / cells).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), statistic / 2)
    assert p_value > 1e-3


def test_seed_choice_and_position_decide() -> None:
    logits = random_logits(1).expand(64, -1)

    def draw(seed: int, choice: int, first: int) -> list[int]:
        rows = [row_of(seed=seed, choice=choice) for _ in range(64)]
        return sample(logits, rows, list(range(first, first + 64))).token_ids.tolist()

    assert draw(1, 0, 20) == draw(1, 0, 20)
    assert draw(1, 0, 20)[1:] == draw(1, 0, 21)[:-1]  # nothing but the position counts
    assert len({tuple(draw(seed, choice, 20)) for seed in (1, 2) for choice in (0, 1, 2)}) == 6
    assert draw(1, 3, 20) == draw(choice_seed(1, 3), 0, 20)
    assert len(set(draw(1, 0, 20))) > 4


def test_neighbours_do_not_matter() -> None:
    """Each row of a mixed batch gets the token, logprob and rank that it gets alone."""
    logits = random_logits(len(PARAMS) * 2)

    def rows() -> list[Row]:
        drawn = [row_of(seed=i, logprobs=i % 4, **params) for i, params in enumerate(PARAMS.values())]
        return drawn + [row_of(logprobs=3, **params | {"temperature": 0.0}) for params in PARAMS.values()]

    together = sample(logits.clone(), rows(), [POSITION] * len(logits))
    for i, row in enumerate(rows()):
        alone = sample(logits[i : i + 1].clone(), [row], [POSITION])
        assert alone.token_ids.item() == together.token_ids[i].item()
        assert waited(alone)[0] == waited(together)[i]


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(len(PARAMS))
    before = logits.clone()
    sample(logits, [row_of(seed=i, **params) for i, params in enumerate(PARAMS.values())], [POSITION] * len(logits))
    assert torch.equal(logits, before)


def test_penalties_count_what_is_sampled() -> None:
    """Ten tokens in a row: each adds to the counts, and a row that starts again with them has the same counts."""
    asked: dict[str, Any] = {
        "temperature": 0.0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.1,
    }
    logits = random_logits(1, seed=2)
    row, output = row_of(output=[], **asked), list[int]()
    for position in range(len(PROMPT), len(PROMPT) + 10):
        (token,) = sample(logits.clone(), [row], [position]).token_ids.tolist()
        assert token == oracle_logits(logits[0].double().numpy(), row.params, output).argmax()
        output.append(token)
    assert len(set(output)) > 3
    again = row_of(output=output, **asked)
    assert row.counts is not None
    assert again.counts is not None
    assert torch.equal(row.counts.generated, again.counts.generated)
    assert torch.equal(row.counts.prompt, again.counts.prompt)


def test_forks_count_for_themselves() -> None:
    parent = row_of(temperature=0.0, frequency_penalty=2.0)
    child = parent.fork(ForkRow(0, 1, 3))
    assert child.seed == choice_seed(parent.request_seed, 3) != parent.seed
    assert child.counts is not None
    before = child.counts.generated.clone()
    sample(random_logits(1), [parent], [POSITION])
    assert torch.equal(child.counts.generated, before)


def test_logprobs_are_the_models_own() -> None:
    """Neither temperature nor penalties nor masks change them; ranks count the strictly likelier tokens."""
    logits = random_logits(4)
    rows = [row_of(seed=i, logprobs=5, **PARAMS["all"]) for i in range(4)]
    sampled = sample(logits, rows, [POSITION] * 4)
    wanted = torch.log_softmax(logits.double(), dim=-1)
    for i, (token, logprob) in enumerate(zip(sampled.token_ids.tolist(), waited(sampled), strict=True)):
        assert logprob is not None
        assert logprob.logprob == pytest.approx(wanted[i, token].item(), abs=1e-5)
        assert logprob.rank == (wanted[i] > wanted[i, token]).sum() + 1
        assert logprob.top_ids == wanted[i].topk(5).indices.tolist()
        assert logprob.top_logprobs == pytest.approx(wanted[i].topk(5).values.tolist(), abs=1e-5)


def test_logprobs_only_where_asked() -> None:
    rows = [row_of(), row_of(logprobs=0), row_of(logprobs=2)]
    none, own, two = waited(sample(random_logits(3), rows, [POSITION] * 3))
    assert none is None
    assert own is not None
    assert own.top_ids == []
    assert two is not None
    assert len(two.top_ids) == len(two.top_logprobs) == 2


def test_half_precision_logits() -> None:
    """What is drawn from bfloat16 logits is what is drawn from the same values in float32."""
    logits = random_logits(100).bfloat16()
    rows = [row_of(seed=i, **PARAMS["all"]) for i in range(100)]
    again = [row_of(seed=i, **PARAMS["all"]) for i in range(100)]
    positions = [POSITION] * 100
    assert torch.equal(sample(logits, rows, positions).token_ids, sample(logits.float(), again, positions).token_ids)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_nucleus_of_a_large_vocabulary(spread: float) -> None:
    """Flat distributions need more tokens than the first look takes; the answer is that of a full sort."""
    logits = spread * torch.randn(8192, generator=torch.Generator().manual_seed(5))
    ordered = torch.softmax(logits.double(), -1).sort(descending=True)
    expected = ordered.indices[ordered.values.cumsum(-1) - ordered.values < 0.8]
    assert (len(expected) > 1024) == (spread < 1)
    order, kept = _nucleus(logits, 0.8)
    found = set(order[kept].tolist())
    assert abs(len(found) - len(expected)) <= 1
    assert len(found ^ set(expected.tolist())) <= 1
