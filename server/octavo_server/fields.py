"""Which fields a request may have beyond those that the protocol classes declare, and what an unknown one is told."""

import difflib
from collections.abc import Collection
from typing import Any

from octavo.errors import RequestError

WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Accepted whatever they hold: they say something about the caller, not about the answer."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_effort": ("none",),
    "refusal": ("",),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
"""Fields of requests and messages of OpenAI and vLLM that are not supported, and the values that ask for nothing.

Null always asks for nothing.
"""


def known_fields(body: dict[str, Any], declared: Collection[str]) -> dict[str, Any]:
    """The body without what has no effect: null, and unsupported fields at a neutral value.

    Raises RequestError, with the field's name, for an unsupported or unknown one.
    """
    kept = {}
    for name, value in body.items():
        if name in declared:
            if value is not None:
                kept[name] = value
        elif name in UNSUPPORTED:
            _check_neutral(name, value)
        elif name not in WITHOUT_EFFECT:
            raise RequestError(f"The field {name!r} is unknown.{_nearest(name, declared)}", name)
    return kept


def _check_neutral(name: str, value: Any) -> None:
    neutral = UNSUPPORTED[name]
    # `in` alone would let 1 pass for true
    if value is not None and not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral
    ):
        accepted = " or ".join(["null", *map(repr, neutral)])
        raise RequestError(f"The field {name!r} is not supported; leave it out, or at {accepted}.", name)


def _nearest(name: str, declared: Collection[str]) -> str:
    near = difflib.get_close_matches(name, [*declared, *UNSUPPORTED, *WITHOUT_EFFECT], 1)
    return f" Did you mean {near[0]!r}?" if near else ""
