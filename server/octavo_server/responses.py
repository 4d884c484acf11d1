"""The answers of OpenAI's API: whole ones and the chunks of a stream."""

from collections.abc import Iterable, Sequence
from typing import Any

from octavo.outputs import Logprob, RequestOutput, TokenLogprobs

from octavo_server.jobs import Job

JSON = dict[str, Any]
_LEAST_LOGPROB = -9999.0  # JSON has no -inf


def usage(num_prompt: int, num_completion: int, num_cached: int) -> JSON:
    """Token counts of a request; `num_cached` prompt tokens were found in the prefix cache."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def total_usage(outputs: Sequence[RequestOutput]) -> JSON:
    """Token counts of finished requests."""
    return usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(choice.token_ids) for output in outputs for choice in output.outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


def envelope(job: Job, kind: str, choices: list[JSON], **more: Any) -> JSON:
    """An answer or a chunk; `kind` is OpenAI's name of the object."""
    head = {"id": job.id, "object": kind, "created": job.created, "model": job.model, "choices": choices}
    return head | more


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None, num_top: int | None
) -> JSON | None:
    """Logprobs in chat's form: each token with the `num_top` most likely ones."""
    if logprobs is None:
        return None
    return {"content": [_chat_token(i, entry, num_top or 0) for i, entry in zip(token_ids, logprobs, strict=True)]}


def _chat_token(token_id: int, entry: TokenLogprobs, num_top: int) -> JSON:
    # The entry holds the sampled token even when it is not among the most likely ones.
    top = sorted((one for one in entry.values() if one.rank <= num_top), key=lambda one: one.rank)
    return _named(entry[token_id]) | {"top_logprobs": [_named(one) for one in top]}


def _named(one: Logprob) -> JSON:
    text = one.decoded_token or ""
    return {"token": text, "logprob": _finite(one.logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def completion_logprobs(
    token_ids: Iterable[int], entries: Iterable[TokenLogprobs | None], texts: Iterable[str], offset: int
) -> JSON:
    """Logprobs in completions' form, as parallel lists; `offset` is where in the text the first token begins."""
    body: JSON = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, entry, text in zip(token_ids, entries, texts, strict=True):
        body["tokens"].append(text)
        body["token_logprobs"].append(None if entry is None else _finite(entry[token_id].logprob))
        body["top_logprobs"].append(None if entry is None else _by_text(entry))
        body["text_offset"].append(offset)
        offset += len(text)
    return body


def _by_text(entry: TokenLogprobs) -> dict[str, float]:
    named: dict[str, float] = {}
    for one in entry.values():
        named.setdefault(one.decoded_token or "", _finite(one.logprob))
    return named


def prompt_logprobs(entries: Sequence[TokenLogprobs | None] | None) -> list[JSON | None] | None:
    """Logprobs of the prompt's tokens by token id; the first token has none."""
    if entries is None:
        return None
    return [None if entry is None else {str(i): _detailed(one) for i, one in entry.items()} for entry in entries]


def _detailed(one: Logprob) -> JSON:
    return {"logprob": _finite(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
