"""The engine tells which requests began to run in its last step."""

from engine_helpers import capacity_of
from hash_model import HashExecutor
from octavo.engine.loop import Engine
from octavo.sampling_params import SamplingParams


def test_each_request_starts_once() -> None:
    capacity = capacity_of(num_blocks=40, max_requests=2)
    engine = Engine(HashExecutor(capacity), capacity)
    for name in "abc":
        engine.add_request(name, [1, 2, 3], SamplingParams(max_tokens=3, n=2 if name == "c" else 1))
    started = []
    while engine.has_work():
        engine.step()
        started.append(list(engine.started))
    assert started[0] == ["a", "b"]
    assert [name for names in started[1:] for name in names] == ["c"]
