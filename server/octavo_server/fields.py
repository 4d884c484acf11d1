"""Which fields a request may have beyond those that the protocol classes declare, and what an unknown one is told."""

import difflib
import logging
from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

from octavo.errors import RequestError
from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("octavo.server")

WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Accepted whatever they hold: they say something about the caller, not about the answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_effort": ("none",),
    "refusal": ("",),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
"""Fields of requests and messages of OpenAI and vLLM that are not supported, and the values that ask for nothing.

Null always asks for nothing.
"""

_only_warn: ContextVar[bool] = ContextVar("only_warn", default=False)


class UnknownFieldsWarned:
    """ASGI middleware under which unknown and unsupported fields are logged and left out, rather than refused."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        token = _only_warn.set(True)
        try:
            await self._app(scope, receive, send)
        finally:
            _only_warn.reset(token)


def known_fields(body: dict[str, Any], declared: Collection[str]) -> dict[str, Any]:
    """The body without what has no effect: null, and unsupported fields at a neutral value.

    Raises RequestError, with the field's name, for an unsupported or unknown one, unless these are only warned of.
    """
    kept = {}
    for name, value in body.items():
        if name in declared:
            if value is not None:
                kept[name] = value
        elif (objection := _objection(name, value, declared)) is not None:
            if not _only_warn.get():
                raise RequestError(objection, name)
            logger.warning("%s It is left out.", objection)
    return kept


def _objection(name: str, value: Any, declared: Collection[str]) -> str | None:
    """Why a field that is not declared cannot be taken; None where it asks for nothing."""
    if name in UNSUPPORTED:
        return None if _asks_nothing(name, value) else _unsupported(name)
    if name in WITHOUT_EFFECT:
        return None
    near = difflib.get_close_matches(name, [*declared, *UNSUPPORTED, *WITHOUT_EFFECT], 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"The field {_short(name)} is unknown.{hint}"


def _asks_nothing(name: str, value: Any) -> bool:
    # `in` alone would let 1 pass for true
    neutral = UNSUPPORTED[name]
    return value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _unsupported(name: str) -> str:
    accepted = " or ".join(["null", *map(repr, UNSUPPORTED[name])])
    return f"The field {name!r} is not supported; leave it out, or at {accepted}."


def _short(name: str, limit: int = 80) -> str:
    return ascii(name) if len(name) <= limit else f"{name[:limit]!a}..."
