"""What a stream tells besides its text, and in what pieces."""

import json
from typing import Any

import pytest
from octavo.output_processor import Delta
from octavo.text.tokenizer import Tokenizer
from octavo_server.api_settings import ApiSettings
from octavo_server.streaming import spaced

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def _stream(service: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await service.client.post(f"/v1/{path}", json={**body, "stream": True})
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_prompt_facts_come_once_a_prompt(service: Any, tokenizer: Tokenizer) -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 2, "prompt_logprobs": 0, "return_token_ids": True}
    chunks = await _stream(service, "completions", body)
    told = [c for chunk in chunks for c in chunk["choices"] if "prompt_logprobs" in c]
    assert {c["index"] // 2: c["prompt_token_ids"] for c in told} == {
        0: tokenizer.encode("ab"),
        1: tokenizer.encode("c"),
    }
    b = str(tokenizer.encode("b")[0])
    lists = {c["index"] // 2: c["prompt_logprobs"] for c in told}
    assert lists == {0: [None, {b: {"logprob": -1.0, "rank": 2, "decoded_token": "b"}}], 1: [None]}
    assert len(told) == 2


async def test_prompt_facts_of_a_chat_are_in_the_first_chunk(service: Any, tokenizer: Tokenizer) -> None:
    body = {**CHAT, "n": 2, "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True}
    first, *others = await _stream(service, "chat/completions", body)
    assert first["prompt_token_ids"] == tokenizer.encode("user:hi;>")
    assert len(first["prompt_logprobs"]) == len("user:hi;>") and first["prompt_logprobs"][0] is None
    assert all("prompt_logprobs" not in chunk and "prompt_token_ids" not in chunk for chunk in others)


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_prompt_facts_are_not_held_back_with_the_text(service: Any) -> None:
    # The stop string keeps the first token's text back.
    body = {"prompt": "ab", "max_tokens": 3, "stop": "abz", "prompt_logprobs": 0}
    first, *_ = await _stream(service, "completions", body)
    assert first["choices"][0]["text"] == "" and len(first["choices"][0]["prompt_logprobs"]) == 2


@pytest.mark.parametrize("settings", [ApiSettings(enable_force_include_usage=True)])
async def test_usage_may_be_forced(service: Any) -> None:
    last = (await _stream(service, "completions", {"prompt": "abc", "max_tokens": 2}))[-1]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)


async def test_stream_options_that_ask_for_nothing_need_no_stream(service: Any) -> None:
    for options in ({}, {"include_usage": False}, {"include_usage": None}):
        body = {"prompt": "abc", "stream_options": options}
        assert (await service.client.post("/v1/completions", json=body)).status_code == 200


@pytest.mark.parametrize("factory", ["start_slow"])
@pytest.mark.parametrize("settings", [ApiSettings(stream_interval=3)])
async def test_tokens_are_joined_to_the_interval(service: Any) -> None:
    body = {"prompt": "abcd", "max_tokens": 8, "logprobs": 0, "return_token_ids": True}
    chunks = await _stream(service, "completions", body)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [c["text"] for c in choices] == ["a", "bcd", "abc", "d"]
    assert [len(c["token_ids"]) for c in choices] == [1, 3, 3, 1]
    assert [c["logprobs"]["text_offset"] for c in choices] == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert [c["finish_reason"] for c in choices] == [None, None, None, "length"]


async def test_what_is_held_back_is_not_lost_with_an_error() -> None:
    async def parts() -> Any:
        for number in range(3):
            yield 0, Delta(0, str(number), [number])
        yield 0, Delta(0, finish_reason="error", error="the step failed")

    found = [delta async for _, delta in spaced(parts(), 5)]
    assert [(delta.text, delta.error) for delta in found] == [("0", None), ("12", None), ("", "the step failed")]


async def test_spacing_keeps_choices_apart() -> None:
    async def parts() -> Any:
        for number in range(4):
            for index in (0, 1):
                end = "stop" if number == 3 else None
                yield 0, Delta(index, f"{index}{number}", [number], finish_reason=end)

    found = [(delta.index, delta.text) async for _, delta in spaced(parts(), 2)]
    assert found == [(0, "00"), (1, "10"), (0, "0102"), (1, "1112"), (0, "03"), (1, "13")]
