"""How a choice looks in an answer: the form of completions and the form of chat, whole and in pieces."""

from collections.abc import Sequence
from typing import Any, Protocol

from octavo.output_processor import Delta
from octavo.outputs import RequestOutput, TokenLogprobs

from octavo_server.jobs import Job
from octavo_server.prompts import is_one
from octavo_server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from octavo_server.responses import (
    JSON,
    chat_logprobs,
    completion_logprobs,
    envelope,
    prompt_logprobs,
    total_usage,
)


class Part(Protocol):
    """A whole choice (CompletionOutput) or what it gained (Delta)."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[TokenLogprobs] | None: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def stop_reason(self) -> int | str | None: ...


class Form(Protocol):
    """The shape of one route's answers."""

    chunk_kind: str

    def whole(self, outputs: Sequence[RequestOutput]) -> JSON:
        """The answer that is not streamed."""

    def chunks(self, prompt: int, delta: Delta, **more: Any) -> list[JSON]:
        """The chunks to stream for what a choice of prompt number `prompt` gained; `more` stands in each of them."""


class CompletionForm:
    """Answers of /v1/completions."""

    chunk_kind = "text_completion"

    def __init__(self, job: Job, body: CompletionRequest) -> None:
        self._job = job
        self._body = body
        self._tokenizer = job.api.engine.tokenizer
        self._echoes = _echoes(job, body) if body.echo else None
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._offsets: dict[tuple[int, int], int] = {}
        self._told: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> JSON:
        """The answer that is not streamed."""
        choices = [
            self._choice(prompt, choice, output.prompt_logprobs)
            | _about_prompt(self._body, output.prompt_token_ids, output.prompt_logprobs)
            for prompt, output in enumerate(outputs)
            for choice in output.outputs
        ]
        return envelope(self._job, self.chunk_kind, choices, usage=total_usage(outputs))

    def chunks(self, prompt: int, delta: Delta, **more: Any) -> list[JSON]:
        """The chunk to stream, if there is something to show; the prompt's own facts stand in its first choice."""
        choice = self._choice(prompt, delta, delta.prompt_logprobs)
        if prompt not in self._told:
            self._told.add(prompt)
            choice |= _about_prompt(self._body, self._job.prompts[prompt], delta.prompt_logprobs)
        worth = _worth_sending(self._body, choice["text"], choice)
        return [envelope(self._job, self.chunk_kind, [choice], **more)] if worth else []

    def _choice(self, prompt: int, part: Part, known_prompt: Sequence[TokenLogprobs | None] | None) -> JSON:
        if known_prompt is not None:
            self._prompt_logprobs[prompt] = known_prompt
        key = (prompt, part.index)
        echo = self._echoes[prompt] if self._echoes is not None and key not in self._offsets else None
        choice = {
            "index": prompt * self._body.n + part.index,
            "text": (echo or "") + part.text,
            "logprobs": self._logprobs(key, part, echo is not None),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        return choice | ({"token_ids": part.token_ids} if self._body.return_token_ids else {})

    def _logprobs(self, key: tuple[int, int], part: Part, with_prompt: bool) -> JSON | None:
        offset = self._offsets.setdefault(key, 0)
        if part.logprobs is None:
            return None
        token_ids, entries = part.token_ids, list[TokenLogprobs | None](part.logprobs)
        if with_prompt:
            token_ids = self._job.prompts[key[0]] + token_ids
            entries = [*self._prompt_logprobs[key[0]], *entries]
        texts = [self._tokenizer.token_text(i) for i in token_ids]
        self._offsets[key] += sum(map(len, texts))
        return completion_logprobs(token_ids, entries, texts, offset)


class ChatForm:
    """Answers of /v1/chat/completions."""

    chunk_kind = "chat.completion.chunk"

    def __init__(self, job: Job, body: ChatRequest) -> None:
        self._job = job
        self._body = body
        self._role = job.api.settings.response_role
        self._started: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> JSON:
        """The answer that is not streamed."""
        (output,) = outputs
        choices = [
            self._choice(part, "message", {"role": self._role, "content": part.text, "refusal": None})
            for part in output.outputs
        ]
        about = _about_prompt(self._body, output.prompt_token_ids, output.prompt_logprobs)
        return envelope(self._job, "chat.completion", choices, usage=total_usage(outputs), **about)

    def chunks(self, prompt: int, delta: Delta, **more: Any) -> list[JSON]:
        """The chunks to stream: a choice's role first, once; the prompt's own facts in the first of all."""
        chunks = []
        if delta.index not in self._started:
            about = {} if self._started else _about_prompt(self._body, self._job.prompts[0], delta.prompt_logprobs)
            self._started.add(delta.index)
            role = {"role": self._role, "content": ""}
            start = {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
            chunks.append(envelope(self._job, self.chunk_kind, [start], **more, **about))
        choice = self._choice(delta, "delta", {"content": delta.text} if delta.text else {})
        if _worth_sending(self._body, delta.text, choice):
            chunks.append(envelope(self._job, self.chunk_kind, [choice], **more))
        return chunks

    def _choice(self, part: Part, name: str, message: JSON) -> JSON:
        choice = {
            "index": part.index,
            name: message,
            "logprobs": chat_logprobs(part.token_ids, part.logprobs, self._body.top_logprobs),
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        return choice | ({"token_ids": part.token_ids} if self._body.return_token_ids else {})


def _worth_sending(body: GenerationRequest, text: str, choice: dict[str, Any]) -> bool:
    """Whether a chunk says anything: a token may be held back as half a character or as the start of a stop string."""
    told = choice["logprobs"] or choice.get("prompt_logprobs")
    return bool(text or choice["finish_reason"] or told or body.return_token_ids)


def _about_prompt(
    body: GenerationRequest, token_ids: list[int], logprobs: Sequence[TokenLogprobs | None] | None
) -> JSON:
    """What the request wants to know about its prompt."""
    about: JSON = {}
    if body.prompt_logprobs is not None:
        about["prompt_logprobs"] = prompt_logprobs(logprobs)
    if body.return_token_ids:
        about["prompt_token_ids"] = token_ids
    return about


def _echoes(job: Job, body: CompletionRequest) -> list[str]:
    """The text of each prompt, as it was given or decoded."""
    given: list[Any] = [body.prompt] if is_one(body.prompt) else body.prompt  # type: ignore[assignment]
    decode = job.api.engine.tokenizer.decode
    return [
        one
        if isinstance(one, str) and body.truncate_prompt_tokens is None
        else decode(tokens, skip_special_tokens=False)
        for one, tokens in zip(given, job.prompts, strict=True)
    ]
