"""A request to the API as the engine sees it: prompts, parameters, and how to run them."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from octavo.admission import sampling_defaults
from octavo.async_engine import AsyncEngine
from octavo.errors import RequestError, StepError
from octavo.output_processor import Delta
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import SamplingParams

from octavo_server.api_settings import ApiSettings
from octavo_server.prompts import chat_prompt, completion_prompts, truncated
from octavo_server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from octavo_server.streaming import cancel, merge, spaced

_Part = TypeVar("_Part", Delta, CompletionOutput)
COMPLETION_TOKENS = 16
"""What /v1/completions generates when max_tokens is left out."""


@dataclass(frozen=True, slots=True)
class Api:
    """What requests are served with. `chat_template` None: the model's own."""

    engine: AsyncEngine
    settings: ApiSettings = field(default_factory=ApiSettings)
    chat_template: str | None = None
    isolate_cache_by_key: bool = False

    def sampling_defaults(self) -> dict[str, Any]:
        """Sampling parameters of requests that do not set them."""
        asked = self.engine.config.generation_config == "auto"
        found = sampling_defaults(self.engine.info.generation_config) if asked else {}
        return {**found, **(self.settings.override_generation_config or {})}

    def cache_salt(self, caller: "Caller", asked: str | None) -> str | None:
        """The salt of a request's prefix-cache entries: what it asks for, and its key where keys share nothing."""
        return f"{caller.key}:{asked or ''}" if self.isolate_cache_by_key else asked


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `request_id` is the client's own id, if any, and `key` stands for its API key (security.key_of)."""

    request_id: str | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts that the engine can take: already tokenised and checked.

    `echo_only`: nothing is wanted but the prompts and their logprobs; the one token that this takes is not shown.
    """

    api: Api
    id: str
    model: str
    prompts: list[list[int]]
    params: list[SamplingParams]
    priority: int
    cache_salt: str | None
    echo_only: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    async def run(self) -> list[RequestOutput]:
        """All outputs, in the order of the prompts. Raises StepError when the engine failed on one."""
        works = [
            self.api.engine.complete(
                f"{self.id}-{i}", tokens, params, priority=self.priority, cache_salt=self.cache_salt
            )
            for i, (tokens, params) in enumerate(zip(self.prompts, self.params, strict=True))
        ]
        # A task of its own would wait behind all requests that came meanwhile.
        outputs = [await works[0]] if len(works) == 1 else await _all(works)
        for choice in (choice for output in outputs for choice in output.outputs):
            check_reason(choice.finish_reason, choice.error)
        if self.echo_only:
            return [replace(one, outputs=[_muted(choice) for choice in one.outputs]) for one in outputs]
        return outputs

    def stream(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(number of the prompt, what one of its choices gained), as the engine generates."""
        parts = merge(
            [
                self.api.engine.generate(
                    f"{self.id}-{i}", tokens, params, priority=self.priority, cache_salt=self.cache_salt
                )
                for i, (tokens, params) in enumerate(zip(self.prompts, self.params, strict=True))
            ]
        )
        if self.echo_only:
            return _all_muted(parts)
        interval = self.api.settings.stream_interval
        return parts if interval == 1 else spaced(parts, interval)


async def _all(works: Sequence[Coroutine[Any, Any, RequestOutput]]) -> list[RequestOutput]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel(tasks)


def _muted(part: _Part) -> _Part:
    """A choice's part without what was generated."""
    reason = "error" if part.finish_reason == "error" else "length"
    logprobs: Any = None if part.logprobs is None else []
    return replace(part, text="", token_ids=[], logprobs=logprobs, finish_reason=reason, stop_reason=None)


async def _all_muted(parts: AsyncGenerator[tuple[int, Delta], None]) -> AsyncGenerator[tuple[int, Delta], None]:
    async with contextlib.aclosing(parts):
        async for prompt, delta in parts:
            yield prompt, _muted(delta)


def check_reason(finish_reason: str | None, error: str | None) -> None:
    """Raise StepError for a choice that ended in an error."""
    if finish_reason == "error":
        raise StepError(error or "The engine failed on this request and gave no reason.")


async def completion_job(api: Api, body: CompletionRequest, model: str, caller: Caller) -> Job:
    """A job for /v1/completions. Raises RequestError for a prompt or parameter that the engine cannot take."""
    prompts = await completion_prompts(api.engine, body)
    # The prompt's logprobs belong to an echo's tokens.
    prompt_logprobs = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    defaults = api.sampling_defaults()
    params = [
        body.sampling_params(
            defaults,
            max_tokens=_completion_tokens(api.engine, body, len(tokens)),
            logprobs=body.logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for tokens in prompts
    ]
    job = _job(api, body, model, caller, "cmpl", prompts, params)
    return replace(job, echo_only=_is_echo_only(body))


async def chat_job(api: Api, body: ChatRequest, model: str, caller: Caller) -> Job:
    """A job for /v1/chat/completions. Raises RequestError as `completion_job` does."""
    tokens = await chat_prompt(
        api.engine,
        body.messages,
        body,
        template=api.chat_template,
        add_special_tokens=body.add_special_tokens,
        defaults=api.settings.default_chat_template_kwargs,
    )
    newer = body.max_completion_tokens is not None
    max_tokens = body.max_completion_tokens if newer else body.max_tokens
    prompt = truncated(api.engine, body, tokens, max_tokens)
    try:
        params = body.sampling_params(
            api.sampling_defaults(),
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        return _job(api, body, model, caller, "chatcmpl", [prompt], [params])
    except RequestError as error:
        if newer and error.field == "max_tokens":  # the client knows the limit by its other name
            text = str(error).replace("max_tokens", "max_completion_tokens")
            raise RequestError(text, "max_completion_tokens") from None
        raise


def _job(
    api: Api,
    body: GenerationRequest,
    model: str,
    caller: Caller,
    kind: str,
    prompts: list[list[int]],
    params: list[SamplingParams],
) -> Job:
    if body.priority and api.engine.config.scheduling_policy != "priority":
        raise RequestError(
            f"priority is {body.priority}, but requests run in the order of their arrival: leave it out, or start the "
            "server with --scheduling-policy priority.",
            "priority",
        )
    for tokens, one in zip(prompts, params, strict=True):
        api.engine.check(tokens, one)
    request_id = caller.request_id or f"{kind}-{uuid.uuid4().hex}"
    return Job(api, request_id, model, prompts, params, body.priority, api.cache_salt(caller, body.cache_salt))


def _completion_tokens(engine: AsyncEngine, body: CompletionRequest, num_prompt: int) -> int:
    if _is_echo_only(body):
        return 1
    if body.max_tokens is not None:
        return body.max_tokens
    return max(body.min_tokens, 1, min(COMPLETION_TOKENS, engine.info.max_model_len - num_prompt))


def _is_echo_only(body: CompletionRequest) -> bool:
    return body.echo and body.max_tokens == 0
