"""A request to the API as the engine sees it: prompts, parameters, and how to run them."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from octavo.admission import sampling_defaults
from octavo.async_engine import AsyncEngine
from octavo.errors import RequestError, StepError
from octavo.output_processor import Delta
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

from octavo_server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from octavo_server.streaming import cancel, merge

COMPLETION_TOKENS = 16
"""What /v1/completions generates when max_tokens is left out."""


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts that the engine can take: already tokenised and checked."""

    engine: AsyncEngine
    id: str
    model: str
    prompts: list[list[int]]
    params: list[SamplingParams]
    priority: int
    cache_salt: str | None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    async def run(self) -> list[RequestOutput]:
        """All outputs, in the order of the prompts. Raises StepError when the engine failed on one."""
        tasks = [
            asyncio.create_task(
                self.engine.complete(
                    f"{self.id}-{i}", tokens, params, priority=self.priority, cache_salt=self.cache_salt
                )
            )
            for i, (tokens, params) in enumerate(zip(self.prompts, self.params, strict=True))
        ]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            await cancel(tasks)
        for choice in (choice for output in outputs for choice in output.outputs):
            check_reason(choice.finish_reason, choice.error)
        return outputs

    def stream(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(number of the prompt, what one of its choices gained), as the engine generates."""
        return merge(
            [
                self.engine.generate(
                    f"{self.id}-{i}", tokens, params, priority=self.priority, cache_salt=self.cache_salt
                )
                for i, (tokens, params) in enumerate(zip(self.prompts, self.params, strict=True))
            ]
        )


def check_reason(finish_reason: str | None, error: str | None) -> None:
    """Raise StepError for a choice that ended in an error."""
    if finish_reason == "error":
        raise StepError(error or "The engine failed on this request and gave no reason.")


async def completion_job(engine: AsyncEngine, body: CompletionRequest, model: str, request_id: str | None) -> Job:
    """A job for /v1/completions. Raises RequestError for a prompt or parameter that the engine cannot take."""
    given = [body.prompt] if _is_one(body.prompt) else body.prompt
    if not given:
        raise RequestError("The prompt is empty, but must hold at least one token.", "prompt")
    prompts: list[list[int]] = []
    for one in given:
        if isinstance(one, str):
            prompts.append(await engine.tokenize(one, add_special_tokens=body.add_special_tokens))
        else:
            prompts.append(list(one))  # type: ignore[arg-type]
    # The prompt's logprobs belong to an echo's tokens.
    prompt_logprobs = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    params = [
        _params(engine, body, _completion_tokens(engine, body, len(tokens)), body.logprobs, prompt_logprobs)
        for tokens in prompts
    ]
    return _job(engine, body, model, request_id or f"cmpl-{uuid.uuid4().hex}", prompts, params)


async def chat_job(engine: AsyncEngine, body: ChatRequest, model: str, request_id: str | None) -> Job:
    """A job for /v1/chat/completions. Raises RequestError as `completion_job` does."""
    messages = [message.for_template() for message in body.messages]
    tokens = await engine.tokenize_chat(
        messages, add_generation_prompt=body.add_generation_prompt, **body.chat_template_kwargs
    )
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(engine, body, max_tokens, logprobs, body.prompt_logprobs)
    return _job(engine, body, model, request_id or f"chatcmpl-{uuid.uuid4().hex}", [tokens], [params])


def _job(
    engine: AsyncEngine,
    body: GenerationRequest,
    model: str,
    request_id: str,
    prompts: list[list[int]],
    params: list[SamplingParams],
) -> Job:
    for tokens, one in zip(prompts, params, strict=True):
        engine.check(tokens, one)
    return Job(engine, request_id, model, prompts, params, body.priority, body.cache_salt)


def _is_one(prompt: Any) -> bool:
    """Whether it is one text or one list of token ids, rather than a list of prompts."""
    return isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))


def _completion_tokens(engine: AsyncEngine, body: CompletionRequest, num_prompt: int) -> int:
    if body.max_tokens is not None:
        return body.max_tokens
    return max(body.min_tokens, 1, min(COMPLETION_TOKENS, engine.info.max_model_len - num_prompt))


def _params(
    engine: AsyncEngine,
    body: GenerationRequest,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    asked = engine.config.generation_config == "auto"
    defaults = sampling_defaults(engine.info.generation_config) if asked else {}
    return body.sampling_params(defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
