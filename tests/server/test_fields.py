"""Which fields pass: declared ones, those without effect, neutral values, and under `warn` all others."""

import logging
from pathlib import Path
from typing import Any

import pytest
from octavo.errors import RequestError
from octavo_server.api_settings import ApiSettings
from octavo_server.fields import UNSUPPORTED, WITHOUT_EFFECT, known_fields
from octavo_server.protocol import ChatRequest, CompletionRequest, TokenizeRequest

REQUESTS: dict[type, dict[str, Any]] = {
    CompletionRequest: {"prompt": "a"},
    ChatRequest: {"messages": [{"role": "user", "content": "a"}]},
    TokenizeRequest: {"prompt": "a"},
}


@pytest.mark.parametrize("cls", REQUESTS)
def test_every_field_may_be_null(cls: Any) -> None:
    names = {*cls.model_fields, *UNSUPPORTED, *WITHOUT_EFFECT} - {"prompt", "messages"}
    assert cls.model_validate({**dict.fromkeys(names), **REQUESTS[cls]}) == cls.model_validate(REQUESTS[cls])


@pytest.mark.parametrize("cls", REQUESTS)
def test_every_field_may_be_at_its_default(cls: Any) -> None:
    plain = cls.model_validate(REQUESTS[cls])
    defaults = {name: getattr(plain, name) for name in cls.model_fields if name not in REQUESTS[cls]}
    assert cls.model_validate({**defaults, **REQUESTS[cls]}).model_dump() == plain.model_dump()


@pytest.mark.parametrize(("name", "value"), [(name, one) for name, ones in UNSUPPORTED.items() for one in ones])
def test_values_that_ask_for_nothing_pass(name: str, value: object) -> None:
    assert known_fields({name: value}, ()) == {}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_values_that_ask_for_something_do_not(name: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is not supported") as error:
        known_fields({name: {"some": "thing"}}, ())
    assert error.value.field == name


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_what_tells_of_the_caller_passes(name: str) -> None:
    assert known_fields({name: ["any", 1]}, ()) == {}


def test_long_unknown_names_are_cut() -> None:
    with pytest.raises(RequestError) as error:
        known_fields({"x" * 10_000: 1}, ())
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("settings", [ApiSettings(unknown_fields="warn")])
async def test_unknown_fields_may_be_warned_of(service: Any, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "ab", "max_tokens": 2, "temprature": 1, "best_of": 4, "stream_options": {"x": 1}}
    with caplog.at_level(logging.WARNING, "octavo.server"):
        answer = await service.client.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == "ab"
    told = " ".join(caplog.messages)
    assert (
        all(name in told for name in ("'temprature'", "'temperature'", "'best_of'", "'x'"))
        and len(caplog.messages) == 3
    )
    wrong = await service.client.post("/v1/completions", json={"prompt": "ab", "temperature": "hot"})
    assert wrong.status_code == 400


@pytest.mark.parametrize("cls", REQUESTS)
def test_the_page_names_every_field(cls: Any) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [name for name in cls.model_fields if f"`{name}`" not in page] == []
