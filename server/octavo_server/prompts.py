"""From what a request holds to the token ids of its prompts."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.async_engine import AsyncEngine
from octavo.errors import RequestError
from octavo.text.threads import check_text

from octavo_server.protocol import ChatMessage, CompletionRequest, GenerationRequest, TemplateOptions

MAX_PROMPTS = 2048
"""In one request: each becomes a request of the engine's."""

_OPEN_END = "<|octavo-continues-here|>"
"""Marks where the last message ends, so that a rendered conversation can be cut there."""


async def completion_prompts(engine: AsyncEngine, body: CompletionRequest) -> list[list[int]]:
    """The prompts of /v1/completions. Raises RequestError for none, and for one that cannot fit."""
    given = [body.prompt] if is_one(body.prompt) else body.prompt
    if not given:
        raise RequestError("The prompt is empty, but must hold at least one token.", "prompt")
    if len(given) > MAX_PROMPTS:
        raise RequestError(f"The request has {len(given)} prompts, but at most {MAX_PROMPTS} are taken.", "prompt")
    prompts: list[list[int]] = []
    for one in given:
        if isinstance(one, str):
            prompts.append(await engine.tokenize(one, add_special_tokens=body.add_special_tokens))
        else:
            prompts.append(list(one))  # type: ignore[arg-type]
    return [truncated(engine, body, tokens, body.max_tokens) for tokens in prompts]


def is_one(prompt: Any) -> bool:
    """Whether it is one text or one list of token ids, rather than a list of prompts."""
    return isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))


async def chat_prompt(
    engine: AsyncEngine,
    messages: Sequence[ChatMessage],
    options: TemplateOptions,
    *,
    template: str | None = None,
    add_special_tokens: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt that a chat template (default: the model's) makes of a conversation.

    `defaults` are variables of the template that the request does not set. Raises RequestError.
    """
    rendered = [message.for_template() for message in messages]
    for message in rendered:
        check_text(message["content"], engine.tokenizer, engine.info.max_model_len)
    variables = {**(defaults or {}), **options.chat_template_kwargs}
    if options.continue_final_message:
        text = await asyncio.to_thread(_render_open, engine, rendered, template, variables)
    else:
        begins = {"add_generation_prompt": options.add_generation_prompt}
        text = await asyncio.to_thread(engine.tokenizer.render_chat, rendered, template, **variables, **begins)
    return await engine.tokenize(text, add_special_tokens=add_special_tokens)


def _render_open(
    engine: AsyncEngine, messages: list[dict[str, Any]], template: str | None, variables: dict[str, Any]
) -> str:
    """The conversation up to where its last message ends, so that the model goes on with it."""
    *before, last = messages
    if any(_OPEN_END in message["content"] for message in messages):
        raise RequestError(f"A message holds {_OPEN_END!r}, which continue_final_message uses itself.", "messages")
    marked = [*before, {**last, "content": last["content"] + _OPEN_END}]
    text = engine.tokenizer.render_chat(marked, template, add_generation_prompt=False, **variables)
    if text.count(_OPEN_END) != 1:
        raise RequestError(
            "The chat template does not write the last message's content once and as it is, so that "
            "continue_final_message cannot tell where it ends.",
            "continue_final_message",
        )
    return text.partition(_OPEN_END)[0]


def truncated(engine: AsyncEngine, body: GenerationRequest, tokens: list[int], max_tokens: int | None) -> list[int]:
    """What `truncate_prompt_tokens` leaves of a prompt; -1 leaves what fits beside `max_tokens`, at least one token."""
    most, limit = body.truncate_prompt_tokens, engine.info.max_model_len
    if most is None:
        return tokens
    if most == -1:
        most = max(1, limit - (max_tokens or 1))
    if not 1 <= most < limit:
        message = f"truncate_prompt_tokens is {most}, but must be -1 or from 1 to {limit - 1}."
        raise RequestError(message, "truncate_prompt_tokens")
    return tokens[-most:] if body.truncation_side == "left" else tokens[:most]
