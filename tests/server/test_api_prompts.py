"""How texts and conversations become tokens: /tokenize, /detokenize, and the fields that shape a prompt."""

from pathlib import Path
from typing import Any

import pytest
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.text.tokenizer import Tokenizer
from octavo_server.api_settings import ApiSettings, read_chat_template

HI = [{"role": "user", "content": "hi"}]
OPEN = [*HI, {"role": "assistant", "content": "he "}]
OTHER_TEMPLATE = ApiSettings(
    chat_template="{{ mood }}:{% for m in messages %}{{ m.content }}{% endfor %}",
    default_chat_template_kwargs={"mood": "sad"},
    response_role="bot",
)


async def _post(service: Any, path: str, body: object, status: int = 200) -> dict[str, Any]:
    response = await service.client.post(path, json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def _error(service: Any, path: str, body: object, status: int = 400) -> tuple[str, str | None]:
    error = (await _post(service, path, body, status))["error"]
    return error["message"], error["param"]


async def _chat_prompt(service: Any, tokenizer: Tokenizer, **body: object) -> str:
    answer = await _post(service, "/v1/chat/completions", {"max_tokens": 1, "return_token_ids": True, **body})
    return tokenizer.decode(answer["prompt_token_ids"], skip_special_tokens=False)


async def test_tokenize_and_back(service: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("aé")
    answer = await _post(service, "/tokenize", {"model": "fake", "prompt": "aé", "return_token_strs": True})
    assert answer == {
        "count": 3,
        "max_model_len": 64,
        "tokens": ids,
        "token_strs": ["a", *[tokenizer.token_text(i) for i in ids[1:]]],
    }
    assert await _post(service, "/detokenize", {"tokens": ids}) == {"prompt": "aé"}
    assert await _post(service, "/detokenize", {"tokens": []}) == {"prompt": ""}
    assert (await _post(service, "/tokenize", {"prompt": ""}))["tokens"] == []


async def test_tokenize_a_conversation(service: Any, tokenizer: Tokenizer) -> None:
    for more, text in (({}, "user:hi;>"), ({"add_generation_prompt": False}, "user:hi;")):
        answer = await _post(service, "/tokenize", {"messages": HI, **more})
        assert (answer["tokens"], answer["token_strs"]) == (tokenizer.encode(text), None)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "prompt", "holds neither"),
        ("/tokenize", {"prompt": "a", "messages": HI}, "prompt", "holds both"),
        ("/tokenize", {"prompt": "x" * 321}, "prompt", "321 characters, but no text of more than 320"),
        ("/tokenize", {"prompt": "a", "promt": 1}, "promt", "Did you mean 'prompt'?"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "valid string"),
        ("/detokenize", {}, "tokens", "missing"),
        ("/detokenize", {"tokens": [300]}, "tokens", "300, but ids are from 0 to 299"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "greater than or equal to 0"),
        ("/detokenize", {"tokens": "ab"}, "tokens", "valid list"),
    ],
)
async def test_token_routes_refuse(service: Any, path: str, body: object, param: str, message: str) -> None:
    found, about = await _error(service, path, body)
    assert message in found and about == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_token_routes_know_the_model(service: Any, path: str) -> None:
    body = {"model": "other", "prompt": "a"} if path == "/tokenize" else {"model": "other", "tokens": [1]}
    assert (await _error(service, path, body, 404))[1] == "model"


async def test_prompts_are_truncated_on_request(service: Any, tokenizer: Tokenizer) -> None:
    async def prompt(**body: object) -> str:
        answer = await _post(service, "/v1/completions", {"max_tokens": 1, "echo": True, **body})
        return str(answer["choices"][0]["text"][: answer["usage"]["prompt_tokens"]])

    assert await prompt(prompt="abcdef", truncate_prompt_tokens=2) == "ef"
    assert await prompt(prompt="abcdef", truncate_prompt_tokens=2, truncation_side="right") == "ab"
    assert await prompt(prompt="ab", truncate_prompt_tokens=5) == "ab"
    assert await prompt(prompt=tokenizer.encode("abcdef"), truncate_prompt_tokens=3) == "def"
    assert await prompt(prompt="x" * 10 + "y" * 60, truncate_prompt_tokens=-1, max_tokens=4) == "y" * 60
    chat = await _chat_prompt(service, tokenizer, messages=HI, truncate_prompt_tokens=3)
    assert chat == "i;>"


@pytest.mark.parametrize("number", [0, -2, 64])
async def test_truncation_has_a_range(service: Any, number: int) -> None:
    found, about = await _error(service, "/v1/completions", {"prompt": "a", "truncate_prompt_tokens": number})
    assert f"is {number}, but must be -1 or from 1 to 63" in found and about == "truncate_prompt_tokens"


async def test_final_message_is_continued(service: Any, tokenizer: Tokenizer) -> None:
    assert await _chat_prompt(service, tokenizer, messages=OPEN) == "user:hi;assistant:he ;>"
    body = {"messages": OPEN, "continue_final_message": True}
    assert await _chat_prompt(service, tokenizer, **body) == "user:hi;assistant:he "
    answer = await _post(service, "/tokenize", {**body, "add_generation_prompt": False})
    assert answer["tokens"] == tokenizer.encode("user:hi;assistant:he ")
    found, about = await _error(service, "/v1/chat/completions", {**body, "add_generation_prompt": True})
    assert "exclude each other" in found and about == "continue_final_message"


@pytest.mark.parametrize("settings", [ApiSettings(chat_template="{{ messages[0].content }}")])
async def test_template_that_drops_the_final_message_cannot_continue_it(service: Any) -> None:
    body = {"messages": OPEN, "continue_final_message": True}
    found, about = await _error(service, "/v1/chat/completions", body)
    assert "cannot tell where it ends" in found and about == "continue_final_message"


@pytest.mark.parametrize("settings", [OTHER_TEMPLATE])
async def test_template_of_the_server(service: Any, tokenizer: Tokenizer) -> None:
    assert await _chat_prompt(service, tokenizer, messages=HI) == "sad:hi"
    assert await _chat_prompt(service, tokenizer, messages=HI, chat_template_kwargs={"mood": "glad"}) == "glad:hi"
    assert (await _post(service, "/tokenize", {"messages": HI}))["tokens"] == tokenizer.encode("sad:hi")
    answer = await _post(service, "/v1/chat/completions", {"messages": HI, "max_tokens": 1})
    assert answer["choices"][0]["message"]["role"] == "bot"


def test_template_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    assert read_chat_template(ApiSettings(chat_template=str(path))) == "{{ messages }}"
    assert read_chat_template(ApiSettings()) is None
    with pytest.raises(ConfigError, match=r"--chat-template names 'nothing\.jinja', which cannot be read"):
        read_chat_template(ApiSettings(chat_template="nothing.jinja"))


async def test_special_tokens_of_a_conversation(service: Any, tokenizer: Tokenizer) -> None:
    # The tokenizer adds none of its own; that the flag reaches it shows in what it is asked.
    asked: list[bool] = []
    encode = service.engine.tokenizer.encode

    def spy(text: str, add_special_tokens: bool = True) -> list[int]:
        asked.append(add_special_tokens)
        return encode(text, add_special_tokens)  # type: ignore[no-any-return]

    service.engine.tokenizer.encode = spy
    try:
        for more, path in (({}, "/v1/chat/completions"), ({"add_special_tokens": True}, "/v1/chat/completions")):
            await _post(service, path, {"messages": HI, "max_tokens": 1, **more})
        for body in ({"prompt": "a"}, {"prompt": "a", "add_special_tokens": False}, {"messages": HI}):
            await _post(service, "/tokenize", body)
    finally:
        del service.engine.tokenizer.encode
    assert asked == [False, True, True, False, False]


async def test_priority_needs_its_policy(service: Any) -> None:
    found, about = await _error(service, "/v1/completions", {"prompt": "a", "priority": 3})
    assert "priority is 3" in found and "--scheduling-policy priority" in found and about == "priority"


@pytest.mark.parametrize("config", [EngineConfig(scheduling_policy="priority")])
async def test_priority_is_taken_under_its_policy(service: Any) -> None:
    await _post(service, "/v1/completions", {"prompt": "a", "priority": -3, "max_tokens": 1})
