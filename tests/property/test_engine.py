"""The whole engine on an executor that withholds its results: what it tells does not depend on how it computes."""

from typing import Any

from engine_helpers import FULL, MAX_MODEL_LEN, Ledger, capacity_of
from hash_model import HashExecutor
from hash_oracle import FIRST_SAMPLED
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.block_manager import KVGroup
from octavo.engine.loop import Engine
from octavo.engine.scheduler import SchedulerLimits
from octavo.sampling_params import SamplingParams
from test_interleavings import QUICK

GROUPS = st.sampled_from([FULL, (KVGroup(6),), (KVGroup(), KVGroup(5))])
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.tuples(st.integers(1, 3), st.integers(1, 40)),
            "n": st.sampled_from([1, 1, 2, 3]),
            "max_tokens": st.integers(1, 20),
            "ignore_eos": st.booleans(),
            "stop_token_ids": st.sampled_from([(), (8,)]),
            "seed": st.integers(0, 3),
            "logprobs": st.sampled_from([None, 1]),
        }
    ),
    min_size=1,
    max_size=8,
)


class Run:
    """A run of the engine: some requests arrive, then `pause` steps are made, and so on to the end."""

    def __init__(self, groups: tuple[KVGroup, ...], spare_blocks: int, depth: int, chunk: int, caching: bool) -> None:
        capacity = capacity_of(
            num_blocks=1 + len(groups) * MAX_MODEL_LEN // 4 + spare_blocks, groups=groups, max_tokens=chunk
        )
        self.executor = HashExecutor(capacity, lazy=True)
        limits = SchedulerLimits(max_requests=capacity.max_requests, max_tokens=chunk)
        self.engine = Engine(self.executor, capacity, limits=limits, prefix_caching=caching, max_steps_in_flight=depth)
        self.ledger = Ledger(groups)

    def add(self, request: dict[str, Any]) -> None:
        token, length = request["prompt"]
        params = SamplingParams(**{name: value for name, value in request.items() if name != "prompt"})
        name = f"request-{len(self.ledger.asked)}"
        prompt = [token] * length
        self.engine.add_request(name, prompt, params)
        self.ledger.add(name, prompt, params, params.seed or 0, params.max_tokens or 0)

    def step(self) -> None:
        self.ledger.take(self.engine.step())
        self.engine.scheduler.blocks.check()

    def finish(self) -> None:
        most = 5000
        while self.engine.has_work() and most:
            self.step()
            most -= 1
        assert most, "the requests do not come to an end"
        assert self.executor.violations == [], self.executor.violations[:3]
        assert self.engine.stats().num_blocks_used == 0


SHAPES = st.tuples(
    GROUPS, st.sampled_from([0, 2, 9, 60]), st.integers(1, 3), st.sampled_from([1, 3, 7, 64]), st.booleans()
)


@QUICK
@given(SHAPES, REQUESTS, st.lists(st.integers(0, 6), min_size=8, max_size=8))
def test_tokens_are_the_oracles_whatever_the_shape_and_the_neighbours(
    shape: tuple[tuple[KVGroup, ...], int, int, int, bool], requests: list[dict[str, Any]], pauses: list[int]
) -> None:
    run = Run(*shape)
    for request, pause in zip(requests, pauses, strict=False):
        run.add(request)
        for _ in range(pause):
            run.step()
    run.finish()
    run.ledger.verify(set())
    for step in run.executor.steps:
        assert not step.set_tokens
        assert all(token < FIRST_SAMPLED for new in step.new_rows for token in new.token_ids[: new.num_prompt_tokens])


@QUICK
@given(SHAPES, REQUESTS, st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["submit", "sample"])), max_size=4))
def test_failures_end_requests_with_a_reason_and_never_change_a_token(
    shape: tuple[tuple[KVGroup, ...], int, int, int, bool],
    requests: list[dict[str, Any]],
    failures: list[tuple[int, str]],
) -> None:
    run = Run(*shape)
    for request in requests:
        run.add(request)
    for pause, how in failures:
        for _ in range(pause):
            run.step()
        run.executor.fail_next = how
    run.finish()
    run.executor.fail_next = None
    run.ledger.verify()
    ended = [told.finish_reason for asked in run.ledger.asked.values() for told in asked.choices]
    assert run.executor.failed_steps or "error" not in ended
