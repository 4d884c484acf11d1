"""Clients that know nothing of Octavo: OpenAI's own, and a load generator in the protocol of vLLM's `bench serve`."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from load_client import measure

MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(service: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's blocking client."""
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(service: Any) -> Any:
    """OpenAI's asynchronous client."""
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_blocking_chat(client: openai.OpenAI) -> None:
    def ask() -> Any:
        return client.chat.completions.create(
            model="fake", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2
        )

    answer = await asyncio.to_thread(ask)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("user", "length")
    assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 4
    assert answer.usage.prompt_tokens_details.cached_tokens == len("user:hi;>") // 2


async def test_blocking_chat_stream(client: openai.OpenAI) -> None:
    def ask() -> tuple[str, Any]:
        stream = client.chat.completions.create(
            model="fake", messages=MESSAGES, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage

    text, usage = await asyncio.to_thread(ask)
    assert (text, usage.completion_tokens) == ("user", 4)


async def test_blocking_completion(client: openai.OpenAI) -> None:
    def ask() -> tuple[Any, str]:
        whole = client.completions.create(model="fake", prompt=["abc", "x"], max_tokens=3, n=2, echo=True, logprobs=1)
        stream = client.completions.create(model="fake", prompt="abc", max_tokens=3, stream=True)
        return whole, "".join(chunk.choices[0].text for chunk in stream)

    whole, streamed = await asyncio.to_thread(ask)
    assert [choice.text for choice in whole.choices] == ["abcabc", "abcbca", "xxxx", "xxxx"]
    assert whole.choices[0].logprobs.token_logprobs == [None, *[-1.0] * 5]
    assert streamed == "abc"


async def test_asynchronous_chat(async_client: openai.AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(async_client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=n) for n in (1, 2, 3))
    )
    assert [answer.choices[0].message.content for answer in answers] == ["u", "us", "use"]


async def test_asynchronous_chat_stream(async_client: openai.AsyncOpenAI) -> None:
    stream = await async_client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=4, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "user"
    async with async_client.chat.completions.stream(model="fake", messages=MESSAGES, stop="r") as events:
        assert (await events.get_final_completion()).choices[0].message.content == "use"


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_asynchronous_completion(async_client: openai.AsyncOpenAI) -> None:
    whole = await async_client.completions.create(model="fake", prompt="abcd", max_tokens=50, stop="cd")
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("ab", "stop")
    stream = await async_client.completions.create(model="fake", prompt=[5, 6], max_tokens=3, stream=True)
    assert len([chunk async for chunk in stream]) == 3


async def test_errors_are_openai_s(async_client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in async_client.models.list()] == ["fake"]
    with pytest.raises(openai.BadRequestError, match="context is 64") as refused:
        await async_client.completions.create(model="fake", prompt="abc", max_tokens=99)
    assert (refused.value.param, refused.value.type) == ("max_tokens", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="'other' is not served") as missing:
        await async_client.completions.create(model="other", prompt="abc")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="'temprature' is unknown"):
        await async_client.completions.create(model="fake", prompt="abc", extra_body={"temprature": 1})


async def test_fields_beyond_openai_s(async_client: openai.AsyncOpenAI) -> None:
    more = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "return_token_ids": True}
    answer = await async_client.completions.create(model="fake", prompt="abc", max_tokens=2, extra_body=more)
    assert answer.choices[0].model_extra is not None and len(answer.choices[0].model_extra["token_ids"]) == 2


@pytest.mark.parametrize("factory", ["start_slow"])
async def test_load_client(service: Any) -> None:
    prompts: list[str | list[int]] = ["abcd", [5, 6, 7], "x" * 40]
    results = await measure(service.url, prompts, max_tokens=6)
    assert [result.num_prompt for result in results] == [4, 3, 40]
    for result in results:
        assert result.num_output == 6 and result.num_events == 6
        assert 0 < result.first_token < result.whole and len(result.gaps) == 5
        assert sum(result.gaps) == pytest.approx(result.whole - result.first_token, abs=0.02)
    assert results[0].text == "abcdab"


async def test_load_client_sees_what_vllm_s_parser_needs(service: Any) -> None:
    """Each event is one `data:` line of JSON with `choices`, the last with `usage`, and the end is [DONE]."""
    body = {"model": "fake", "prompt": "ab", "max_tokens": 3, "stream": True, "logprobs": None, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    async with httpx.AsyncClient(base_url=service.url) as http:
        lines = [line for line in (await http.post("/v1/completions", json=body)).text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    *chunks, last = (json.loads(line[6:]) for line in lines[:-1])
    assert all(len(chunk["choices"]) == 1 and "text" in chunk["choices"][0] for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
