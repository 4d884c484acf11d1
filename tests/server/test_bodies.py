"""Large bodies: read in a thread and in pieces, and otherwise no different from small ones."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo_server import bodies
from octavo_server.api_settings import ApiSettings

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.sampled_from(["[", "{", '"', "\\", ","]),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=5),
    max_leaves=40,
)  # fmt: skip
LONG = [1] * 60_000


@pytest.fixture(scope="module", autouse=True)
def small_pieces() -> Any:
    """What is large is small here, so that short examples are cut too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "_PIECE_BYTES", 8)
        yield


@given(VALUES, st.sampled_from([None, 1]), st.sampled_from([(",", ":"), (" ,\n", " :\t")]))
def test_pieces_make_what_the_whole_makes(value: Any, indent: int | None, separators: tuple[str, str]) -> None:
    text = " " + json.dumps(value, indent=indent, separators=separators) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert bodies.parse(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3, 4, 5, 6,",
        "[1, 2, 3, 4, 5,, 6, 7, 8]",
        "[1, 2, 3, 4, 5, 6,]",
        "[,1, 2, 3, 4, 5]",
        "[1, 2, 3, 4] 5, 6]",
        "[1 2, 3, 4, 5, 6, 7]",
        '{"a": [1, 2, NaN]}',
        '{"prompt": "\\ud800"}',
        "[" * 100_000,
        "nonsense, this is",
        "",
    ],
)
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        bodies.parse(text.encode())


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": LONG}, "prompt", "60000 tokens, but the model's context of 64"),
        ({"prompt": [*LONG, "a"]}, "prompt", "must be a text"),
        ({"prompt": [*LONG, True]}, "prompt", "must be a text"),
        ({"prompt": [*LONG, -1]}, "prompt", "must be a text"),
        ({"prompt": [*LONG[:10_000], *["a"] * 20_000]}, "prompt", "must be a text"),
        ({"prompt": "a" * 70_000}, "prompt", "70000 characters"),
        ({"prompt": "a", "temprature": LONG}, "temprature", "Did you mean 'temperature'"),
        ({"prompt": "a", "temperature": LONG}, "temperature", "temperature"),
        ({"prompt": "a", "stop_token_ids": [*LONG, "b"]}, "stop_token_ids", "stop_token_ids"),
        ({"prompt": "a", "temperature": "x" * 70_000}, "temperature", "xxx"),
    ],
)
async def test_large_bodies_are_refused_as_small_ones_are(
    service: Any, body: dict[str, Any], param: str, message: str
) -> None:
    response = await service.client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"], error


async def test_large_bodies_are_answered(service: Any) -> None:
    async def ask(route: str, **body: Any) -> Any:
        return (await service.client.post(route, json=body)).raise_for_status().json()

    few = await ask("/v1/completions", prompt=[*LONG, 5, 6], truncate_prompt_tokens=2, max_tokens=2)
    assert few["usage"]["prompt_tokens"] == 2
    many = await ask("/v1/completions", prompt=[[5, 6] * 20] * 600, max_tokens=1)
    assert len(many["choices"]) == 600
    whole = await ask("/detokenize", tokens=LONG)
    assert whole == await ask("/detokenize", tokens=LONG[:10]) | {"prompt": whole["prompt"]} and whole["prompt"]


async def test_large_body_of_another_kind_is_one_sentence(service: Any) -> None:
    for content, kind in ((b"[" + b"1," * 50_000, "application/json"), (b"a" * 70_000, "text/plain")):
        response = await service.client.post("/v1/completions", content=content, headers={"Content-Type": kind})
        assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize("settings", [ApiSettings(unknown_fields="warn")])
async def test_unknown_fields_of_a_large_body_may_be_only_warned_of(service: Any) -> None:
    response = await service.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "zzz": LONG})
    assert response.status_code == 200


async def _longest_pause(work: Callable[[], Any]) -> float:
    """The most seconds for which the event loop does nothing else while it awaits `work`."""
    task, longest = asyncio.create_task(work()), 0.0
    while not task.done():
        begin = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - begin)
    await task
    return longest


async def test_the_event_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_PIECE_BYTES", 1 << 16)
    body = json.dumps({"prompt": list(range(10_000, 700_000))}).encode()

    async def read() -> None:
        await asyncio.to_thread(bodies.parse, body)

    async def read_at_once() -> None:
        json.loads(body)

    async def least(work: Callable[[], Any]) -> float:
        return min([await _longest_pause(work) for _ in range(5)])

    assert await least(read) < 0.8 * await least(read_at_once)
