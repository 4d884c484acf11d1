"""What a reader that falls behind gets: everything, in order, as one delta a choice."""

from typing import Any

import pytest
from octavo.errors import EngineDeadError
from octavo.output_processor import Delta
from octavo.outputs import Logprob, TokenLogprobs
from octavo.request_stream import RequestStream


class Endless:
    """A processor that is never finished, unless it is told so."""

    finished = False


def stream_of(*deltas: Delta) -> RequestStream:
    processor: Any = Endless()
    stream = RequestStream(processor)
    for delta in deltas:
        stream.put(delta)
    return stream


async def read(stream: RequestStream) -> list[Delta]:
    """What waits in the stream."""
    stream.processor.finished = True  # type: ignore[misc]
    return [delta async for delta in stream]


def logprob(token_id: int) -> TokenLogprobs:
    return {token_id: Logprob(-0.5, 1, str(token_id))}


async def test_one_that_keeps_up_gets_each_delta_as_it_came() -> None:
    stream = stream_of()
    for token_id in range(3):
        delta = Delta(0, str(token_id), [token_id])
        stream.put(delta)
        assert await anext(stream) is delta


async def test_what_waits_becomes_one_delta_and_nothing_is_lost() -> None:
    first = Delta(0, "a", [1], [logprob(1)], num_cached_tokens=7, prompt_logprobs=[None])
    middle = Delta(0, "b", [2], [logprob(2)])
    last = Delta(0, "c", [3], [logprob(3)], "stop", 3, abort=True)
    assert await read(stream_of(first, middle, last)) == [
        Delta(
            0,
            "abc",
            [1, 2, 3],
            [logprob(1), logprob(2), logprob(3)],
            "stop",
            3,
            abort=True,
            num_cached_tokens=7,
            prompt_logprobs=[None],
        )
    ]


async def test_choices_stay_apart_in_the_order_of_their_first_delta() -> None:
    waiting = [Delta(1, "x", [1]), Delta(0, "a", [2]), Delta(1, "y", [3]), Delta(0, "b", [4], None, "length")]
    assert await read(stream_of(*waiting)) == [Delta(1, "xy", [1, 3]), Delta(0, "ab", [2, 4], None, "length")]


async def test_what_came_before_an_error_is_read_before_it() -> None:
    failed = Delta(0, finish_reason="error", error="the step failed")
    assert await read(stream_of(Delta(0, "a", [1]), Delta(0, "b", [2]), failed)) == [Delta(0, "ab", [1, 2]), failed]


async def test_what_waits_is_read_before_the_end_of_the_engine_is_told() -> None:
    stream = stream_of(Delta(0, "a", [1]), Delta(0, "b", [2]))
    stream.fail(EngineDeadError("it is gone"))
    assert await anext(stream) == Delta(0, "ab", [1, 2])
    with pytest.raises(EngineDeadError, match="gone"):
        await anext(stream)
