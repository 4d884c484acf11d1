"""What the routes answer, whole and streamed."""

import json
from typing import Any

import fake_engine
import openai
import pytest
from octavo import __version__
from octavo.text.tokenizer import Tokenizer


async def _post(service: Any, path: str, body: object, status: int = 200) -> dict[str, Any]:
    response = await service.client.post(f"/v1/{path}", json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def _stream(service: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with service.client.stream("POST", f"/v1/{path}", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = (await response.aread()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def _joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def _chat(text: str, **more: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


CHAT_PROMPT = "user:hi;>"  # what the tokenizer's template makes of _chat("hi")


async def test_status_routes(service: Any) -> None:
    assert (await service.client.get("/live")).status_code == 200
    assert (await service.client.get("/health")).json() == {"status": "ready"}
    assert (await service.client.get("/version")).json() == {"version": __version__}
    (card,) = (await service.client.get("/v1/models")).json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 64)


async def test_completion(service: Any) -> None:
    answer = await _post(service, "completions", {"model": "fake", "prompt": "abc", "max_tokens": 5, "user": "me"})
    assert answer["object"] == "text_completion" and answer["model"] == "fake" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_completion_generates_16_tokens_unless_told(service: Any) -> None:
    answer = await _post(service, "completions", {"prompt": "a"})
    assert answer["usage"]["completion_tokens"] == 16
    answer = await _post(service, "completions", {"prompt": "a" * 60})
    assert answer["usage"]["completion_tokens"] == 4  # what the context of 64 leaves


@pytest.mark.parametrize("stream", [False, True])
async def test_prompts_of_every_kind_and_choices_are_numbered(service: Any, tokenizer: Tokenizer, stream: bool) -> None:
    kinds = ["ab", ["ab", "x"], tokenizer.encode("ab"), [tokenizer.encode("ab"), tokenizer.encode("x")]]
    for prompt in kinds:
        body = {"prompt": prompt, "n": 2, "max_tokens": 3}
        if stream:
            chunks = await _stream(service, "completions", body)
            num_choices = 1 + max(c["index"] for chunk in chunks for c in chunk["choices"])
            texts = [_joined(chunks, index) for index in range(num_choices)]
        else:
            choices = (await _post(service, "completions", body))["choices"]
            assert [c["index"] for c in choices] == list(range(len(choices)))
            texts = [c["text"] for c in choices]
        both = isinstance(prompt, list) and not isinstance(prompt[0], int)
        assert texts == (["aba", "bab", "xxx", "xxx"] if both else ["aba", "bab"])


async def test_stop_string_in_every_form(service: Any) -> None:
    for stop in ("cd", ["zz", "cd"]):
        answer = await _post(service, "completions", {"prompt": "abcd", "stop": stop, "max_tokens": 50})
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "cd")
        assert answer["usage"]["completion_tokens"] == 4
        chunks = await _stream(service, "completions", {"prompt": "abcd", "stop": stop, "max_tokens": 50})
        assert _joined(chunks) == "ab"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("as_tokens", [False, True])
async def test_echo(service: Any, tokenizer: Tokenizer, as_tokens: bool) -> None:
    body = {"prompt": tokenizer.encode("abc") if as_tokens else "abc", "echo": True, "max_tokens": 2, "n": 2}
    answer = await _post(service, "completions", body)
    assert [c["text"] for c in answer["choices"]] == ["abcab", "abcbc"]
    chunks = await _stream(service, "completions", body)
    assert [_joined(chunks, index) for index in (0, 1)] == ["abcab", "abcbc"]


async def test_completion_logprobs(service: Any, tokenizer: Tokenizer) -> None:
    body = {"prompt": "ab", "max_tokens": 2, "logprobs": 2}
    logprobs = (await _post(service, "completions", body))["choices"][0]["logprobs"]
    other = tokenizer.token_text(10)
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"a": -1.0, other: -0.5}, {"b": -1.0, other: -0.5}],
        "text_offset": [0, 1],
    }
    echoed = (await _post(service, "completions", {**body, "echo": True}))["choices"][0]["logprobs"]
    assert echoed["tokens"] == ["a", "b", "a", "b"]
    assert echoed["token_logprobs"] == [None, -1.0, -1.0, -1.0]
    assert echoed["top_logprobs"][0] is None
    assert echoed["text_offset"] == [0, 1, 2, 3]
    chunks = await _stream(service, "completions", {**body, "echo": True})
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {name: [entry for part in parts for entry in part[name]] for name in echoed} == echoed


@pytest.mark.parametrize("n", [1, 2])
async def test_echo_without_generation_shows_the_prompt_alone(service: Any, n: int) -> None:
    body = {"prompt": "ab", "echo": True, "max_tokens": 0, "logprobs": 1, "n": n, "return_token_ids": True}
    answer = await _post(service, "completions", body)
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("ab", "length", [])
        assert choice["logprobs"]["tokens"] == ["a", "b"] and choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["prompt_tokens"] == 2
    chunks = await _stream(service, "completions", body)
    assert [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]] == ["ab"] * n
    without = await service.client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 0})
    assert without.status_code == 400 and "max_tokens is 0" in without.json()["error"]["message"]


async def test_prompt_logprobs_and_token_ids(service: Any, tokenizer: Tokenizer) -> None:
    body = {"prompt": "ab", "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    choice = (await _post(service, "completions", body))["choices"][0]
    a, b = tokenizer.encode("ab")
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([a, b], [a])
    assert choice["prompt_logprobs"] == [
        None,
        {
            str(b): {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
            "10": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(10)},
        },
    ]
    chat = {"max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}
    answer = await _post(service, "chat/completions", _chat("hi", **chat))
    assert answer["prompt_token_ids"] == tokenizer.encode(CHAT_PROMPT)
    assert answer["choices"][0]["token_ids"] == tokenizer.encode("u")
    assert len(answer["prompt_logprobs"]) == len(CHAT_PROMPT)


async def test_chat(service: Any) -> None:
    answer = await _post(service, "chat/completions", _chat("hi", max_tokens=4))
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "user", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == len(CHAT_PROMPT)


async def test_chat_runs_to_the_end_of_the_context(service: Any) -> None:
    answer = await _post(service, "chat/completions", _chat("hi"))
    assert answer["usage"]["total_tokens"] == fake_engine.MAX_MODEL_LEN
    answer = await _post(service, "chat/completions", _chat("hi", max_tokens=9, max_completion_tokens=3))
    assert answer["usage"]["completion_tokens"] == 3


async def test_chat_messages_of_every_kind(service: Any, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [{"id": "1"}]},
    ]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True, "add_generation_prompt": False}
    answer = await _post(service, "chat/completions", body)
    assert answer["prompt_token_ids"] == tokenizer.encode("system:s;user:a\nb;assistant:;")


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_chat_stream(service: Any) -> None:
    chunks = await _stream(service, "chat/completions", _chat("hi", max_tokens=4, n=2))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, text in enumerate(["user", "ser:"]):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in choices) == text
        assert [c["finish_reason"] for c in choices] == [None] * 4 + ["length"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_chat_logprobs(service: Any, tokenizer: Tokenizer) -> None:
    body = _chat("hi", max_tokens=1, logprobs=True, top_logprobs=1)
    other = tokenizer.token_text(10)
    expected = {
        "content": [
            {
                "token": "u",
                "logprob": -1.0,
                "bytes": [117],
                "top_logprobs": [{"token": other, "logprob": -0.5, "bytes": list(other.encode())}],
            }
        ]
    }
    assert (await _post(service, "chat/completions", body))["choices"][0]["logprobs"] == expected
    assert (await _stream(service, "chat/completions", body))[-1]["choices"][0]["logprobs"] == expected
    body = _chat("hi", max_tokens=1, logprobs=True)
    (entry,) = (await _post(service, "chat/completions", body))["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_stream_usage(service: Any) -> None:
    body = {"prompt": ["abc", "x"], "max_tokens": 2, "stream_options": {"include_usage": True}}
    *chunks, last = await _stream(service, "completions", body)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await _stream(service, "completions", body)
    totals = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert totals == sorted(totals) and totals[0] == 1 and totals[-1] == 4


async def test_request_id_is_kept(service: Any) -> None:
    assert (await _post(service, "completions", {"prompt": "a", "request_id": "mine"}))["id"] == "mine"
    response = await service.client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "theirs"})
    assert response.json()["id"] == "theirs"


async def test_openai_client(service: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        chat = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], max_tokens=4, temperature=0
        )
        assert chat.choices[0].message.content == "user"
        stream = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "user"
        completion = await client.completions.create(model="fake", prompt="abc", max_tokens=3)
        assert completion.choices[0].text == "abc"
        assert [model.id async for model in client.models.list()] == ["fake"]
        with pytest.raises(openai.BadRequestError, match="context is 64"):
            await client.completions.create(model="fake", prompt="abc", max_tokens=99)
        with pytest.raises(openai.NotFoundError, match="'other' is not served"):
            await client.completions.create(model="other", prompt="abc")
