"""How a choice looks in an answer: the form of completions and the form of chat, whole and in pieces."""

from collections.abc import Sequence
from typing import Any, Protocol

from octavo.outputs import RequestOutput, TokenLogprobs

from octavo_server.jobs import Job
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

    def pieces(self, prompt: int, part: Part, known_prompt: Sequence[TokenLogprobs | None] | None) -> list[JSON]:
        """The choices to stream for what choice `part.index` of prompt number `prompt` gained, a chunk each.

        `known_prompt` holds the prompt's logprobs, with the prompt's first part.
        """


class CompletionForm:
    """Answers of /v1/completions."""

    chunk_kind = "text_completion"

    def __init__(self, job: Job, body: CompletionRequest) -> None:
        self._job = job
        self._body = body
        self._tokenizer = job.engine.tokenizer
        self._echoes = _echoes(job, body) if body.echo else None
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._offsets: dict[tuple[int, int], int] = {}

    def whole(self, outputs: Sequence[RequestOutput]) -> JSON:
        """The answer that is not streamed."""
        choices = []
        for prompt, output in enumerate(outputs):
            for choice in output.outputs:
                entry = self._choice(prompt, choice, output.prompt_logprobs)
                if self._body.prompt_logprobs is not None:
                    entry["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
                if self._body.return_token_ids:
                    entry["prompt_token_ids"] = output.prompt_token_ids
                choices.append(entry)
        return envelope(self._job, "text_completion", choices, usage=total_usage(outputs))

    def pieces(self, prompt: int, part: Part, known_prompt: Sequence[TokenLogprobs | None] | None) -> list[JSON]:
        """The choice to stream, if there is something to show."""
        choice = self._choice(prompt, part, known_prompt)
        return [choice] if _worth_sending(self._body, choice["text"], choice) else []

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
        self._started: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput]) -> JSON:
        """The answer that is not streamed."""
        (output,) = outputs
        choices = [
            self._choice(part, "message", {"role": "assistant", "content": part.text, "refusal": None})
            for part in output.outputs
        ]
        more: JSON = {"usage": total_usage(outputs)}
        if self._body.prompt_logprobs is not None:
            more["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            more["prompt_token_ids"] = output.prompt_token_ids
        return envelope(self._job, "chat.completion", choices, **more)

    def pieces(self, prompt: int, part: Part, known_prompt: Sequence[TokenLogprobs | None] | None) -> list[JSON]:
        """The choices to stream: the role first, once."""
        pieces = []
        if part.index not in self._started:
            self._started.add(part.index)
            delta = {"role": "assistant", "content": ""}
            pieces.append({"index": part.index, "delta": delta, "logprobs": None, "finish_reason": None})
        choice = self._choice(part, "delta", {"content": part.text} if part.text else {})
        return [*pieces, choice] if _worth_sending(self._body, part.text, choice) else pieces

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
    return bool(text or choice["finish_reason"] or choice["logprobs"] or body.return_token_ids)


def _echoes(job: Job, body: CompletionRequest) -> list[str]:
    """The text of each prompt, as it was given or decoded."""
    given: list[Any] = [body.prompt] if len(job.prompts) == 1 and not _is_list_of_prompts(body.prompt) else body.prompt  # type: ignore[assignment]
    decode = job.engine.tokenizer.decode
    return [
        one if isinstance(one, str) else decode(tokens, skip_special_tokens=False)
        for one, tokens in zip(given, job.prompts, strict=True)
    ]


def _is_list_of_prompts(prompt: Any) -> bool:
    return isinstance(prompt, list) and not isinstance(prompt[0], int)
