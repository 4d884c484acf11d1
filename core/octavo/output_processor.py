"""From token events to text: one request's choices, their logprobs and their stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from octavo.engine.step import TokenEvent, TokenLogprob
from octavo.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from octavo.sampling_params import SamplingParams
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What an event added to one choice of a request.

    `text` is safe to show: later tokens never change it. `abort` asks the caller to end the choice in the engine, which
    does not know of the stop string that ended it. `prompt_logprobs` (first entry None) and `num_cached_tokens` come
    once a request, with its first delta.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    abort: bool = False
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one choice that follow each other, as one."""
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    logprobs = None
    if first.logprobs is not None:
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return replace(
        last,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs,
        num_cached_tokens=first.num_cached_tokens,
        prompt_logprobs=first.prompt_logprobs,
    )


class OutputProcessor:
    """Turns the events of one request into deltas and keeps the whole of its output.

    `prompt` is the text that was given, None for token ids.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
    ) -> None:
        self._params = params
        self._tokenizer = tokenizer
        self._started = False
        self._detokenizers = [Detokenizer(tokenizer, params, prompt_token_ids) for _ in range(params.n)]
        outputs = [CompletionOutput(index) for index in range(params.n)]
        if params.logprobs is not None:
            for output in outputs:
                output.logprobs, output.cumulative_logprob = [], 0.0
        self.output = RequestOutput(request_id, prompt, prompt_token_ids, outputs)
        if params.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None]

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return self.output.finished

    def push(self, event: TokenEvent) -> Delta | None:
        """Take an event; None when it adds nothing to show, as one that comes after a stop string does."""
        if self.output.prompt_logprobs is not None:
            known = len(self.output.prompt_logprobs)
            token_ids = self.output.prompt_token_ids[known : known + len(event.prompt_logprobs)]
            self.output.prompt_logprobs += self._named(token_ids, event.prompt_logprobs)
        if event.num_cached_tokens is not None:
            self.output.num_cached_tokens = event.num_cached_tokens
        if self.output.outputs[event.choice].finish_reason is not None:
            return None
        if not event.token_ids and event.finish_reason is None:
            return None
        delta = self._advance(event)
        self._keep(delta)
        return delta

    def _advance(self, event: TokenEvent) -> Delta:
        detokenizer = self._detokenizers[event.choice]
        known = detokenizer.num_tokens
        text = detokenizer.push(self._shown(event))
        finish_reason, stop_reason, token_ids = event.finish_reason, event.stop_reason, event.token_ids
        if finish_reason is not None:
            text += detokenizer.finish()
        if detokenizer.stop_reason is not None:
            token_ids = token_ids[: detokenizer.num_tokens - known]
            finish_reason, stop_reason = "stop", detokenizer.stop_reason
        first, self._started = not self._started, True
        return Delta(
            event.choice,
            text,
            token_ids,
            None if self._params.logprobs is None else self._named(token_ids, event.logprobs[: len(token_ids)]),
            finish_reason,
            stop_reason,
            event.error,
            abort=event.finish_reason is None and finish_reason is not None,
            num_cached_tokens=self.output.num_cached_tokens if first else None,
            prompt_logprobs=self.output.prompt_logprobs if first else None,
        )

    def _shown(self, event: TokenEvent) -> list[int]:
        """The tokens whose text belongs to the output: not the one that ended it, unless it was asked for."""
        if event.finish_reason == "stop" and not self._params.include_stop_str_in_output:
            return event.token_ids[:-1]
        return event.token_ids

    def _named(self, token_ids: list[int], logprobs: list[TokenLogprob]) -> list[TokenLogprobs]:
        return [self._with_text(i, entry) for i, entry in zip(token_ids, logprobs, strict=True)]

    def _with_text(self, token_id: int, entry: TokenLogprob) -> TokenLogprobs:
        text = self._tokenizer.token_text
        named = {token_id: Logprob(entry.logprob, entry.rank, text(token_id))}
        for rank, (top_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), start=1):
            if top_id != token_id:
                named[top_id] = Logprob(logprob, rank, text(top_id))
        return named

    def _keep(self, delta: Delta) -> None:
        output = self.output.outputs[delta.index]
        output.text += delta.text
        output.token_ids += delta.token_ids
        output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        output.error = delta.error
        if delta.logprobs is not None and output.logprobs is not None:
            output.logprobs += delta.logprobs
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(
                entry[token_id].logprob for entry, token_id in zip(delta.logprobs, delta.token_ids, strict=True)
            )
        self.output.finished = all(choice.finish_reason is not None for choice in self.output.outputs)
