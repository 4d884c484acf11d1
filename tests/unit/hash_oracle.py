"""A two-layer language model made of hashes, over a sequence that lies in a plain list.

Layer l of KV group g keeps a cell for each token: layer 1's is a hash of the token and its position, layer 2's a hash
of the state after layer 1, so of all that layer 1 saw. A state is a hash of the sums of the cells that the group sees.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from octavo.engine.block_manager import KVGroup
from octavo.engine.step import TokenLogprob
from octavo.sampling_params import SamplingParams, choice_seed

MASK = (1 << 64) - 1
EOS = 7
EOS_TOKEN_IDS = frozenset({EOS})
FIRST_SAMPLED = 1_000_000  # sampled tokens other than EOS and STOP are from here on, so that a test can tell them
VOCAB_SIZE = FIRST_SAMPLED + (1 << 20)
STOP = 8
SPECIAL_ODDS = 16  # one token in so many is EOS, another one STOP


def mix(*values: int) -> int:
    """64 bits that depend on all of `values`; the same in every process."""
    return hash(values) & MASK


def pick(state: int, seed: int, position: int, params: SamplingParams, generated: Sequence[int]) -> int:
    """The token for `position`: of the state, the choice's seed and, as with penalties, of what was generated."""
    draw = mix(state, seed, position, *sorted(generated))
    masked = {EOS, *params.stop_token_ids} if len(generated) < params.min_tokens else set()
    for token, remainder in ((EOS, 0), (STOP, 1)):
        if draw % SPECIAL_ODDS == remainder and token not in masked:
            return token
    return FIRST_SAMPLED + (draw >> 8) % (1 << 20)


def told_logprob(state: int, token: int) -> TokenLogprob:
    """A logprob that tells states apart."""
    return TokenLogprob(-float(mix(state, token) % 1_000_003), 1, [token], [-1.0])


class Oracle:
    """The states of one sequence."""

    def __init__(self, groups: Sequence[KVGroup], token_ids: Iterable[int]) -> None:
        self.groups = groups
        self.token_ids: list[int] = []
        self.states: list[int] = []
        self._sums = [[[0] for _ in groups] for _ in range(2)]
        for token in token_ids:
            self.push(token)

    def push(self, token: int) -> None:
        """The sequence goes on with `token`."""
        position = len(self.token_ids)
        self.token_ids.append(token)
        self._keep(0, position, token)
        middle = mix(token, position, *self._seen(0, position))
        self._keep(1, position, middle)
        self.states.append(mix(middle, *self._seen(1, position)))

    def _keep(self, layer: int, position: int, value: int) -> None:
        for group, sums in enumerate(self._sums[layer]):
            sums.append(sums[-1] + mix(layer, group, value, position))

    def _seen(self, layer: int, position: int) -> list[int]:
        return [
            sums[position + 1] - sums[first_seen(group, position)]
            for group, sums in zip(self.groups, self._sums[layer], strict=True)
        ]


def first_seen(group: KVGroup, position: int) -> int:
    """The first position that a query at `position` sees."""
    return 0 if group.window is None else max(0, position - group.window + 1)


@dataclass(frozen=True)
class Expected:
    """What one choice must end in."""

    token_ids: list[int]
    finish_reason: str
    stop_reason: int | None
    logprobs: list[TokenLogprob]


def expect(
    groups: Sequence[KVGroup], prompt: Sequence[int], params: SamplingParams, seed: int, choice: int, most: int
) -> Expected:
    """The output of one choice, alone in the world, of at most `most` tokens."""
    oracle = Oracle(groups, prompt)
    generated: list[int] = []
    logprobs: list[TokenLogprob] = []
    while True:
        state = oracle.states[-1]
        token = pick(state, choice_seed(seed, choice), len(oracle.token_ids), params, generated)
        oracle.push(token)
        generated.append(token)
        logprobs.append(told_logprob(state, token))
        if len(generated) >= params.min_tokens:
            if token == EOS and not params.ignore_eos:
                return Expected(generated, "stop", None, logprobs)
            if token in params.stop_token_ids:
                return Expected(generated, "stop", token, logprobs)
        if len(generated) >= most:
            return Expected(generated, "length", None, logprobs)


def expect_prompt_logprobs(groups: Sequence[KVGroup], prompt: Sequence[int]) -> list[TokenLogprob]:
    """The logprobs of the prompt's tokens from the second on."""
    states = Oracle(groups, prompt).states
    return [told_logprob(state, token) for state, token in zip(states, prompt[1:], strict=False)]
