"""The API's own flags: what it does with requests beyond what they say themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.config import check_known, documented
from octavo.errors import ConfigError

UNKNOWN_FIELDS = ("refuse", "warn")
TEMPLATE_ARGUMENTS = frozenset(
    {"self", "messages", "template", "add_generation_prompt", "bos_token", "eos_token", "tools"}
)
"""What a chat template has from elsewhere: neither chat_template_kwargs nor their defaults may set it."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """How the API treats requests. Raises ConfigError for a value out of range."""

    unknown_fields: str = documented(
        "refuse: a field that is unknown or not supported is an error; warn: it is logged and left out", "refuse"
    )
    chat_template: str | None = documented("file of a chat template, or its text; default: the model's own")
    response_role: str = documented("role of the messages that chat answers", "assistant")
    default_chat_template_kwargs: Mapping[str, Any] | None = documented(
        "variables for the chat template, for requests that do not set them in chat_template_kwargs"
    )
    override_generation_config: Mapping[str, Any] | None = documented(
        f"sampling defaults that win over the model's: {', '.join(_SAMPLING)}"
    )
    enable_force_include_usage: bool = documented("tell token counts in every stream, asked or not", False)
    stream_interval: int = documented("tokens in an event of a stream; the first token comes at once", 1)
    disable_log_stats: bool = documented("collect no metrics: /metrics tells of the process only", False)

    def __post_init__(self) -> None:
        if self.unknown_fields not in UNKNOWN_FIELDS:
            known = " or ".join(UNKNOWN_FIELDS)
            raise ConfigError(f"--unknown-fields is {self.unknown_fields!r}, but must be {known}.")
        if self.stream_interval < 1:
            raise ConfigError(f"--stream-interval is {self.stream_interval}, but must be at least 1.")
        for name in TEMPLATE_ARGUMENTS & (self.default_chat_template_kwargs or {}).keys():
            raise ConfigError(f"--default-chat-template-kwargs holds {name!r}, which the template has from elsewhere.")
        for name in self.override_generation_config or {}:
            check_known(name, _SAMPLING, "a sampling parameter of --override-generation-config")


def read_chat_template(settings: ApiSettings) -> str | None:
    """The text of `--chat-template`, or None. Raises ConfigError when it is no file and no template."""
    given = settings.chat_template
    if given is None or "{%" in given or "{{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template names {given!r}, which cannot be read: {error}.") from error
