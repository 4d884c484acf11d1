"""What a request may not hold: each is a 400 that names the field and the numbers."""

from typing import Any

import fake_engine
import pytest

GOOD: dict[str, Any] = {"prompt": "abc"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


async def _refused(service: Any, path: str, **request: Any) -> tuple[str, str | None]:
    response = await service.client.post(f"/v1/{path}", **request)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error["message"], error["param"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temprature": 1}, "temprature", "unknown. Did you mean 'temperature'?"),
        ({"zzzzz": None}, "zzzzz", "'zzzzz' is unknown."),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "null or 1"),
        ({"best_of": True}, "best_of", "null or 1"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"stream": "yes"}, "stream", "found 'yes'"),
        ({"stream": 1}, "stream", "found 1"),
        ({"temperature": "1"}, "temperature", "found '1'"),
        ({"temperature": True}, "temperature", "found True"),
        ({"max_tokens": 1.5}, "max_tokens", "found 1.5"),
        ({"max_tokens": 10**30}, "max_tokens", "2147483648"),
        ({"max_tokens": 0}, "max_tokens", "0, but must be at least 1"),
        ({"max_tokens": 62}, "max_tokens", "3 tokens and max_tokens is 62, together 65, but the model's context is 64"),
        ({"temperature": -0.5}, "temperature", "-0.5, but must be from 0 to 100"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.5}, "top_p", "1.5, but must be from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"n": 0}, "n", "0, but must be from 1 to 128"),
        ({"n": 129}, "n", "129, but must be from 1 to 128"),
        ({"n": 9}, "n", "9, but at most 8"),
        ({"stop": ["a"] * 17}, "stop", "17 strings, but at most 16"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": [1]}, "stop", "stop: Input should be a valid string; found [1]"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "300, but ids are from 0 to 299"),
        ({"logit_bias": {"3": 101}}, "logit_bias", "logit_bias[3] is 101.0, but must be from -100 to 100"),
        ({"logprobs": 21}, "logprobs", "21, but at most 20"),
        ({"logprobs": True}, "logprobs", "found True"),
        ({"seed": 2**63}, "seed", "9223372036854775808"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "x", "unknown"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "a list of token ids"),
        ({"prompt": {"a": 1}}, "prompt", "a list of token ids"),
        ({"prompt": [300]}, "prompt", "300, but ids are from 0 to 299"),
        ({"prompt": [-1]}, "prompt", "token ids"),
        ({"prompt": "x" * 64}, "prompt", "64 tokens, but the model's context of 64"),
        ({"prompt": "x" * 321}, "prompt", "321 characters, but no text of more than 320"),
        ({"prompt": None}, "prompt", "missing"),
        ({"messages": []}, "messages", "unknown"),
    ],
)
async def test_completion_refuses(service: Any, fields: dict[str, Any], param: str, message: str) -> None:
    found, about = await _refused(service, "completions", json={**GOOD, **fields})
    assert message in found
    assert about == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "found 'hi'"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "colour", "unknown"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"content": "x"}]}, "messages", "missing"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "prompt", "400 characters"),
        (
            {"max_completion_tokens": 60},
            "max_completion_tokens",
            "max_completion_tokens is 60, together 69, but the model's context is 64",
        ),
        ({"logprobs": 1}, "logprobs", "found 1"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs", "21, but at most 20"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "null or 'none' or 'auto'"),
        ({"prompt": "x"}, "prompt", "unknown"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
        ({"chat_template_kwargs": {"template": "{{ 1 }}"}}, "chat_template_kwargs", "'template'"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "'self'"),
    ],
)
async def test_chat_refuses(service: Any, fields: dict[str, Any], param: str, message: str) -> None:
    found, about = await _refused(service, "chat/completions", json={**CHAT, **fields})
    assert message in found
    assert about == param


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b"[" * 100000,
    ],
)
async def test_broken_bodies_are_refused(service: Any, content: bytes) -> None:
    await _refused(service, "completions", content=content, headers={"Content-Type": "application/json"})


async def test_body_of_another_type_is_refused(service: Any) -> None:
    message, _ = await _refused(service, "completions", data={"prompt": "abc"})
    assert "Content-Type: application/json" in message


async def test_what_has_no_effect_is_accepted(service: Any) -> None:
    more = {
        "user": "me",
        "metadata": {"a": 1},
        "store": True,
        "service_tier": "auto",
        "best_of": 1,
        "suffix": None,
        "response_format": {"type": "text"},
        "logit_bias": None,
        "stop": None,
        "seed": None,
        "n": None,
        "top_k": -1,
        "stream": None,
        "stream_options": None,
        "temperature": None,
    }
    response = await service.client.post("/v1/completions", json={**GOOD, **more})
    assert response.status_code == 200, response.text
    more = {"tools": [], "tool_choice": "auto", "functions": None, "parallel_tool_calls": True, "logprobs": False}
    response = await service.client.post("/v1/chat/completions", json={**CHAT, **more})
    assert response.status_code == 200, response.text


async def test_unknown_model_and_routes(service: Any) -> None:
    response = await service.client.post("/v1/completions", json={**GOOD, "model": "other"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found" and "'fake'" in response.json()["error"]["message"]
    response = await service.client.get("/v1/nothing")
    assert response.status_code == 404 and "/v1/nothing" in response.json()["error"]["message"]
    response = await service.client.get("/v1/completions")
    assert response.status_code == 405 and "does not take GET" in response.json()["error"]["message"]


async def test_failed_step_is_a_500_or_an_event(service: Any) -> None:
    body = {"prompt": [1, fake_engine.FAIL]}
    response = await service.client.post("/v1/completions", json=body)
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["message"]) == ("server_error", "the step failed on purpose")
    response = await service.client.post("/v1/completions", json={**body, "stream": True})
    assert response.status_code == 200
    first, done, _ = response.text.split("\n\n")
    assert "the step failed on purpose" in first and done == "data: [DONE]"
    assert (await service.client.post("/v1/completions", json=GOOD)).status_code == 200


async def test_refusal_of_a_stream_is_a_400(service: Any) -> None:
    await _refused(service, "completions", json={**GOOD, "max_tokens": 99, "stream": True})
