"""A request's counts, hashes, forks and ends."""

from typing import Any

import pytest
from octavo.engine.block_manager import chain_hash
from octavo.engine.request import Request, Status
from octavo.sampling_params import SamplingParams


def request_of(num_prompt: int = 5, most: int = 4, **params: Any) -> Request:
    return Request("a", 1, list(range(num_prompt)), SamplingParams(**params), most, 9)


def test_counts_of_tokens() -> None:
    request = request_of()
    assert (request.num_prompt, request.num_known, request.num_tokens, request.num_wanted) == (5, 5, 5, 5)
    request.num_computed, request.num_in_flight = 5, 1
    assert (request.num_known, request.num_tokens, request.num_wanted) == (5, 6, 1)
    request.num_in_flight = 0
    request.output_token_ids.append(70)
    assert (request.num_known, request.num_tokens, request.num_wanted) == (6, 6, 1)
    assert request.known_token_ids() == [0, 1, 2, 3, 4, 70]


@pytest.mark.parametrize(
    ("num_output", "num_in_flight", "wanted"), [(3, 0, 8), (2, 1, 8), (4, 0, 0), (3, 1, 0), (2, 2, 0)]
)
def test_nothing_is_wanted_past_the_last_token(num_output: int, num_in_flight: int, wanted: int) -> None:
    request = request_of()
    request.output_token_ids = [70] * num_output
    request.num_in_flight = num_in_flight
    assert request.num_wanted == wanted


def test_a_sync_request_wants_nothing_while_a_token_is_in_flight() -> None:
    request = request_of()
    request.sync = True
    assert request.num_wanted == 5
    request.num_in_flight = 1
    assert request.num_wanted == 0


def test_the_last_token_of_a_request_is_never_computed() -> None:
    request = request_of()
    assert request.last_computed == 5 + request.max_output_tokens - 1


def test_hashes_cover_full_blocks_of_prompt_and_output() -> None:
    request = request_of(6)
    request.cache_salt = "salt"
    request.extend_hashes(4)
    first = chain_hash(b"", [0, 1, 2, 3], "salt")
    assert request.hashes == [first]
    request.output_token_ids = [70, 71, 72, 73, 74]
    request.extend_hashes(4)
    second = chain_hash(first, [4, 5, 70, 71], "salt")
    assert request.hashes == [first, second]
    request.output_token_ids += [75]
    request.extend_hashes(4)
    assert request.hashes == [first, second, chain_hash(second, [72, 73, 74, 75], "salt")]


def test_hashes_of_many_blocks_at_once_are_those_of_one_after_the_other() -> None:
    request, slow = request_of(9), request_of(9)
    request.output_token_ids = list(range(50, 60))
    request.extend_hashes(4)
    for token in range(50, 60):
        slow.output_token_ids.append(token)
        slow.extend_hashes(4)
    assert len(request.hashes) == 4
    assert request.hashes == slow.hashes


def test_hashes_are_computed_once() -> None:
    request = request_of(8)
    request.extend_hashes(4)
    hashes = list(request.hashes)
    request.prompt_token_ids[0] = 99  # what was hashed is not looked at again
    request.extend_hashes(4)
    assert request.hashes == hashes


def test_a_fork_is_another_choice_at_the_same_point() -> None:
    request = Request(
        "a", 1, [1, 2, 3, 4], SamplingParams(), 7, 9, choices=3, priority=4, arrival=5, cache_salt="s", sync=True
    )
    request.status = Status.RUNNING
    request.num_computed, request.num_cached, request.num_published, request.last_step = 4, 2, 1, 11
    request.extend_hashes(4)
    child = request.fork(8, 2, 3)
    assert (child.id, child.key, child.choice, child.choices, child.row) == ("a", 8, 2, 1, 3)
    for name in ("prompt_token_ids", "params", "max_output_tokens", "seed", "priority", "arrival", "cache_salt"):
        assert getattr(child, name) == getattr(request, name)
    for name in ("sync", "status", "num_computed", "num_cached", "hashes", "num_published", "last_step"):
        assert getattr(child, name) == getattr(request, name)
    assert (child.shared_step, child.num_in_flight, child.output_token_ids, child.spare_rows) == (11, 0, [], [])
    child.hashes.append(b"")
    assert len(request.hashes) == 1


def test_finished() -> None:
    request = request_of()
    assert not request.finished
    request.status = Status.RUNNING
    assert not request.finished
    request.status = Status.FINISHED
    assert request.finished


@pytest.mark.parametrize(
    ("output", "params", "reason"),
    [
        ([70], {}, None),
        ([7], {}, ("stop", None)),
        ([7], {"ignore_eos": True}, None),
        ([8], {"stop_token_ids": (8,)}, ("stop", 8)),
        ([7], {"stop_token_ids": (7,)}, ("stop", None)),
        ([7], {"stop_token_ids": (7,), "ignore_eos": True}, ("stop", 7)),
        ([7], {"min_tokens": 2}, None),
        ([70, 7], {"min_tokens": 2}, ("stop", None)),
        ([70, 70, 70, 70], {}, ("length", None)),
        ([70, 70, 70, 7], {}, ("stop", None)),
        ([70, 70, 70, 7], {"ignore_eos": True}, ("length", None)),
    ],
)
def test_what_ends_a_request(output: list[int], params: dict[str, Any], reason: tuple[str, int | None] | None) -> None:
    request = request_of(**params)
    request.output_token_ids = output
    assert request.stop_reason(output[-1], frozenset({7})) == reason
