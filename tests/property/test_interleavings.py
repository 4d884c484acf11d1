"""Laws of the engine under any interleaving: no token lost or wrong, no block lost, every choice ends exactly once.

The executor really computes a model through block tables: a wrong block, copy, hit or window shows as a wrong token.
"""

from typing import Any

import pytest
from engine_helpers import FULL, MAX_MODEL_LEN, Rig, capacity_of
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from octavo.engine.block_manager import KVGroup

QUICK = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=120,
    stateful_step_count=40,
    phases=[Phase.explicit, Phase.generate],  # a failure prints its steps; shrinking it takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
LONG = settings(QUICK, max_examples=2000, stateful_step_count=80)

GROUPS = (FULL, (KVGroup(6),), (KVGroup(), KVGroup(5)), (KVGroup(9), KVGroup(3), KVGroup()))
BLOCK_SIZE = 4
MAX_REQUESTS = 25
SALTS = ("", "", "pepper")
# Prompts share beginnings: a few stems, cut anywhere, and then a few tokens of their own.
STEMS = ([11] * 40, list(range(20, 60)), [11] * 9 + list(range(70, 101)))


def prompts() -> st.SearchStrategy[tuple[int, int, list[int]]]:
    """Stem, where it is cut, and what follows: prompts of 1 to 44 tokens, whose beginnings others have too."""
    return st.tuples(st.integers(0, 2), st.integers(1, 40), st.lists(st.integers(1, 3), max_size=4))


def engines() -> st.SearchStrategy[dict[str, Any]]:
    """Shapes of an engine: many have few blocks, rows and tokens a step."""
    return st.fixed_dictionaries(
        {
            "groups": st.sampled_from(GROUPS),
            "spare_blocks": st.sampled_from([0, 1, 3, 8, 40]),
            "max_requests": st.integers(3, 8),
            "max_tokens": st.sampled_from([1, 3, 5, 7, 16, MAX_MODEL_LEN]),
            "max_tokens_per_prompt": st.sampled_from([0, 0, 2, 5]),
            "by_priority": st.booleans(),
            "chunked_prefill": st.sampled_from([True, True, True, False]),
            "prefix_caching": st.sampled_from([True, True, False]),
            "depth": st.integers(1, 3),
        }
    )


def requests() -> st.SearchStrategy[dict[str, Any]]:
    """Requests that end in every way."""
    return st.fixed_dictionaries(
        {
            "prompt": prompts(),
            "n": st.sampled_from([1, 1, 1, 2, 3]),
            "max_tokens": st.one_of(st.integers(1, 20), st.none()),
            "ignore_eos": st.booleans(),
            "stop_token_ids": st.sampled_from([(), (8,)]),
            "min_tokens": st.integers(0, 1),
            "prompt_logprobs": st.sampled_from([None, None, None, 1]),
            "logprobs": st.sampled_from([None, 1]),
            "seed": st.integers(0, 3),
            "priority": st.integers(0, 2),
            "salt": st.sampled_from(SALTS),
            "sync": st.sampled_from([False, False, False, True]),
        }
    )


def build(engine: dict[str, Any]) -> tuple[Rig, int]:
    """The engine of this shape and its depth."""
    engine = dict(engine)
    depth, groups = engine.pop("depth"), engine.pop("groups")
    max_tokens = engine.pop("max_tokens") if engine["chunked_prefill"] else MAX_MODEL_LEN
    capacity = capacity_of(
        num_blocks=1 + len(groups) * MAX_MODEL_LEN // BLOCK_SIZE + engine.pop("spare_blocks"),
        block_size=BLOCK_SIZE,
        groups=groups,
        max_requests=engine.pop("max_requests"),
        max_tokens=max_tokens,
        max_steps_in_flight=depth,
    )
    engine.pop("max_tokens", None)
    return Rig(capacity, **engine), depth


class Interleavings(RuleBasedStateMachine):
    """Arrivals, steps, outputs, aborts and failures in any order."""

    @initialize(engine=engines())
    def start(self, engine: dict[str, Any]) -> None:
        self.rig, self.depth = build(engine)

    @rule(request=requests())
    def add(self, request: dict[str, Any]) -> None:
        if len(self.rig.ledger.asked) < MAX_REQUESTS:
            stem, cut, rest = request["prompt"]
            self.rig.add(**request | {"prompt": STEMS[stem][:cut] + rest})

    @rule(request=requests(), number=st.integers(2, 5))
    def add_several(self, request: dict[str, Any], number: int) -> None:
        for _ in range(number):
            self.add(request)

    @precondition(lambda self: len(self.rig.outputs) < self.depth)
    @rule()
    def submit(self) -> None:
        self.rig.submit()
        self.rig.blocks.check()

    @precondition(lambda self: self.rig.outputs)
    @rule()
    def deliver(self) -> None:
        self.rig.deliver()

    @rule(number=st.integers(1, 12))
    def steps(self, number: int) -> None:
        for _ in range(number):
            while len(self.rig.outputs) < self.depth and self.rig.submit() is not None:
                pass
            if self.rig.outputs:
                self.rig.deliver()

    @precondition(lambda self: self.rig.ledger.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.rig.abort(data.draw(st.sampled_from(sorted(self.rig.ledger.asked))))

    @precondition(lambda self: self.rig.ledger.asked)
    @rule(data=st.data())
    def abort_choice(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.rig.ledger.asked)))
        choices = self.rig.ledger.asked[name].choices
        speaking = [choice for choice, told in enumerate(choices) if told.token_ids]
        if speaking:  # a stop string needs a token to be in
            self.rig.abort(name, data.draw(st.sampled_from(speaking)))

    @precondition(lambda self: len(self.rig.outputs) < self.depth)
    @rule(how=st.sampled_from(["submit", "sample"]))
    def fail(self, how: str) -> None:
        self.rig.executor.fail_next = how
        self.rig.submit()
        self.rig.executor.fail_next = None

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.run(self.depth)


class LongInterleavings(Interleavings):
    """The same, for longer."""


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = QUICK
TestLongInterleavings = pytest.mark.slow(LongInterleavings.TestCase)
TestLongInterleavings.settings = LONG
