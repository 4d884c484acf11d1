"""Chat templates, rendered in jinja2's immutable sandbox: a template comes with a model and is not trusted."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.errors import CheckpointError, RequestError

Message = Mapping[str, Any]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what a model wrote, for training: here it means its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> list[Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it is: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise CheckpointError(f"The chat template is no valid jinja2 template: {error}.") from error


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> str:
    """The text of a chat, to be encoded without adding special tokens: the template writes them.

    `kwargs` are further variables of the template. Raises RequestError when the template refuses the messages, and
    CheckpointError when it is no template.
    """
    variables = {
        "messages": [_flatten(message) for message in messages],
        "add_generation_prompt": add_generation_prompt,
        "bos_token": bos_token or "",
        "eos_token": eos_token or "",
        "tools": tools,
    }
    compiled = _compile(template)
    try:
        return compiled.render(**{**kwargs, **variables})
    except Exception as error:  # a template can raise anything that Python can
        raise RequestError(f"The chat template refuses these messages: {error}.", "messages") from error


def _flatten(message: Message) -> dict[str, Any]:
    """A message whose content is one string, as templates expect it: text parts are joined by newlines."""
    content = message.get("content")
    if content is None:
        content = ""
    elif not isinstance(content, str):
        content = "\n".join(_part_text(part) for part in content)
    return {**message, "content": content}


def _part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise RequestError(f"A message holds a part of the type {kind!r}, but only text is supported.", "messages")
    return text
