"""The requests of OpenAI's API, with vLLM's additions. Types are strict: "1" is no number and 1 is no truth value."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, model_validator
from pydantic_core import PydanticCustomError

from octavo_server.api_settings import TEMPLATE_ARGUMENTS
from octavo_server.fields import known_fields

_SLICE = 10_000


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError(
            "unicode", "The text holds half a surrogate pair, which no Unicode text has"
        ) from None
    return text


def _in_slices(value: Any, handler: Any) -> Any:
    """Long lists in slices, since pydantic lets no other thread run until it is done with one."""
    if not isinstance(value, list) or len(value) <= _SLICE:
        return handler(value)
    slices = (value[start : start + _SLICE] for start in range(0, len(value), _SLICE))
    return [item for one in slices for item in handler(one)]


def _one_kind(value: Any, handler: Any) -> Any:
    """One sentence rather than one for each member of the union that did not match."""
    try:
        found = _in_slices(value, handler)
        if isinstance(found, list) and len(set(map(type, found[::_SLICE]))) > 1:
            raise ValueError("each slice is of a kind, but not all of the same")
        return found
    except ValueError:
        kinds = "a text, a list of texts, a list of token ids, or a list of such lists"
        raise PydanticCustomError("prompt", f"The prompt must be {kinds}") from None


def _unicode_inside(value: Any) -> Any:
    """The same for all texts inside; without recursion, since a client says how deep it goes."""
    left = [value]
    while left:
        match left.pop():
            case str() as text:
                _unicode(text)
            case dict() as inner:
                left += [*inner, *inner.values()]
            case list() as inner:
                left += inner
    return value


Text = Annotated[str, AfterValidator(_unicode)]
Loose = Annotated[dict[str, Any], AfterValidator(_unicode_inside)]
Int = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_T = TypeVar("_T")
ListOf = Annotated[list[_T], Field(fail_fast=True), WrapValidator(_in_slices)]
"""A list that is refused at its first wrong item: a client could send a million."""

Prompt = Annotated[
    Text | ListOf[Text] | ListOf[TokenId] | ListOf[ListOf[TokenId]],
    WrapValidator(_one_kind),
]


class Strict(BaseModel):
    """Strictly typed, no unknown fields; null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        return known_fields(body, cls.model_fields) if isinstance(body, dict) else body


class StreamOptions(Strict):
    """What a stream tells besides its text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(Strict):
    """What completions and chat have in common."""

    model: Text | None = None
    n: Int = 1
    max_tokens: Int | None = None
    min_tokens: Int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = {}
    seed: Seed | None = None
    stop: Text | ListOf[Text] = []
    stop_token_ids: ListOf[TokenId] = []
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    prompt_logprobs: Int | None = None
    allowed_token_ids: ListOf[TokenId] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Int = 0
    cache_salt: Text | None = None
    request_id: Text | None = None
    return_token_ids: bool = False
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] = "left"

    @model_validator(mode="after")
    def _options_need_stream(self) -> "GenerationRequest":
        options = self.stream_options
        if options is not None and (options.include_usage or options.continuous_usage_stats) and not self.stream:
            raise RequestError("stream_options needs stream to be true.", "stream_options")
        return self

    def sampling_params(
        self, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The engine's parameters: what the request says, else `defaults`. Raises RequestError for one out of range."""
        asked = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        given = {name: value for name, value in asked.items() if value is not None}
        return SamplingParams(
            **{**defaults, **given},
            n=self.n,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_token_bias(self.logit_bias),
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
        )


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: Prompt
    logprobs: Int | None = None
    echo: bool = False
    add_special_tokens: bool = True


class TextPart(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | ListOf[TextPart] | None = None
    name: Text | None = None
    tool_calls: ListOf[Loose] | None = None
    tool_call_id: Text | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: `developer` is OpenAI's newer name of `system`."""
        message = self.model_dump(exclude_none=True)
        message["role"] = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, str):
            message["content"] = "\n".join(part.text for part in self.content or [])
        return message


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class TemplateOptions(Strict):
    """How a conversation becomes a prompt. `continue_final_message` leaves the last message open."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Loose = {}

    @model_validator(mode="after")
    def _template_keeps_its_own(self) -> "TemplateOptions":
        for name in TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys():
            message = f"chat_template_kwargs holds {name!r}, which the chat template has from elsewhere."
            raise RequestError(message, "chat_template_kwargs")
        return self

    @model_validator(mode="after")
    def _continues_or_begins(self) -> "TemplateOptions":
        begins = "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt
        if self.continue_final_message and begins:
            message = "continue_final_message and add_generation_prompt are both true, but exclude each other."
            raise RequestError(message, "continue_final_message")
        return self


class ChatRequest(GenerationRequest, TemplateOptions):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Int | None = None
    logprobs: bool = False
    top_logprobs: Int | None = None
    add_special_tokens: bool = False

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
        return self


class TokenizeRequest(TemplateOptions):
    """Body of /tokenize: a text, or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            found = "neither" if self.prompt is None else "both"
            raise RequestError(f"The body must hold either prompt or messages, but holds {found}.", "prompt")
        return self


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    model: Text | None = None
    tokens: ListOf[TokenId]


def _token_bias(bias: Mapping[str, float]) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise RequestError(f"logit_bias has the key {token!r}, but keys must be token ids.", "logit_bias")
    return {int(token): value for token, value in bias.items()}
