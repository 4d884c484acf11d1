"""Request, generation_config and defaults: which one a sampling parameter comes from."""

from typing import Any

import pytest
from octavo.sampling_params import SamplingParams
from octavo_server.protocol import ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def _params(body: dict[str, Any], defaults: dict[str, Any] | None = None) -> SamplingParams:
    request = CompletionRequest.model_validate({"prompt": "a", **body})
    return request.sampling_params(defaults or {}, max_tokens=5, logprobs=None, prompt_logprobs=None)


def test_request_wins_over_generation_config() -> None:
    defaults = {"temperature": 0.5, "top_p": 0.5, "top_k": 7, "repetition_penalty": 1.5}
    assert _params({}, defaults) == SamplingParams(max_tokens=5, **defaults)
    asked = {"temperature": 0, "top_p": 0.25, "top_k": 0, "repetition_penalty": 1, "min_p": 0.125}
    assert _params(asked, defaults) == SamplingParams(max_tokens=5, **asked)
    assert _params({}) == SamplingParams(max_tokens=5)


def test_every_field_reaches_the_engine() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "min_tokens": 1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"3": 1.5},
        "seed": 11,
        "stop": ["x", "y"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "allowed_token_ids": [5, 6],
    }
    fixed = {"logit_bias": {3: 1.5}, "stop": ("x", "y"), "stop_token_ids": (4,), "allowed_token_ids": (5, 6)}
    assert _params(fields) == SamplingParams(max_tokens=5, **{**fields, **fixed})


def test_one_stop_string_is_a_list_of_one() -> None:
    assert _params({"stop": "end"}).stop == ("end",)


@pytest.mark.parametrize("setting", ["auto", "octavo"])
async def test_generation_config_counts_only_when_it_is_on(service: Any, setting: str) -> None:
    from dataclasses import replace

    from octavo_server.jobs import Api, Caller, chat_job

    service.engine.config = replace(service.engine.config, generation_config=setting)
    job = await chat_job(Api(service.engine), ChatRequest.model_validate(CHAT), "fake", Caller())
    assert job.params == [SamplingParams(max_tokens=None, temperature=0.5 if setting == "auto" else 1.0)]
