"""The messages between server and engine: what is sent is what arrives, and a cut or oversized frame is an error."""

import asyncio
import io

import pytest
from octavo import wire
from octavo.admission import EngineInfo
from octavo.config import EngineConfig
from octavo.engine.step import EngineStats, TokenEvent, TokenLogprob
from octavo.errors import EngineDeadError
from octavo.sampling_params import SamplingParams

PARAMS = SamplingParams(
    n=2, max_tokens=None, logit_bias={7: -1.5}, stop=("a", "b"), stop_token_ids=(3,), allowed_token_ids=(1, 2), seed=-5
)
EVENT = TokenEvent(
    "a", 1, [5, 6], [TokenLogprob(-1.0, 2, [5], [-0.5])], [], "stop", "end", num_cached_tokens=3, error="why"
)
COMMANDS: list[wire.ToEngine] = [
    wire.Start(EngineConfig(model="m", plugins=("p",), attention_backend=("a", "b")), "module:function"),
    wire.Add("é", [1, 2, 3], PARAMS, priority=-1, cache_salt="s"),
    wire.Abort("a"),
    wire.Abort("a", 1),
    wire.GetStats(4),
    wire.ResetPrefixCache(5),
    wire.Stop(),
]
NEWS: list[wire.FromEngine] = [
    wire.Phase("loading"),
    wire.Ready(EngineInfo(model="m", max_model_len=8, vocab_size=9, backends=[{"kind": "ops", "why": None}])),
    wire.Failed("ConfigError", "no"),
    wire.Events([EVENT, TokenEvent("b", 0, [])]),
    wire.Events([], {"a": 0.5}, EngineStats(num_running=1, kv_slots=16, kv_tokens=3)),
    wire.Refused("a", "no", "n"),
    wire.Answer(1, EngineStats(num_running=3, kv_usage=0.5)),
    wire.Answer(2, True),
]


async def _read(data: bytes) -> wire.FromEngine:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await wire.read_news(reader)


def test_commands_arrive_as_they_were_sent() -> None:
    stream = io.BytesIO(b"".join(map(wire.encode, COMMANDS)))
    assert [wire.read_command(stream) for _ in COMMANDS] == COMMANDS
    assert wire.read_command(stream) is None


@pytest.mark.parametrize("message", NEWS, ids=lambda message: type(message).__name__)
async def test_news_arrive_as_they_were_sent(message: wire.FromEngine) -> None:
    assert await _read(wire.encode(message)) == message


@pytest.mark.parametrize("length", [1, 3, 4, 5, -1])
def test_cut_frame_is_an_error(length: int) -> None:
    with pytest.raises(EngineDeadError, match="middle of a message"):
        wire.read_command(io.BytesIO(wire.encode(COMMANDS[1])[:length]))


@pytest.mark.parametrize("length", [0, 1, 4, -1])
async def test_cut_news_are_the_end(length: int) -> None:
    with pytest.raises(asyncio.IncompleteReadError):
        await _read(wire.encode(NEWS[0])[:length])


async def test_length_over_the_limit_is_refused_before_it_is_read() -> None:
    header = (wire.MAX_FRAME_BYTES + 1).to_bytes(wire.LENGTH_BYTES, "big")
    with pytest.raises(EngineDeadError, match=str(wire.MAX_FRAME_BYTES)):
        wire.read_command(io.BytesIO(header))
    with pytest.raises(EngineDeadError, match=str(wire.MAX_FRAME_BYTES)):
        await _read(header)
