"""Threads for the tokenizer, so that the event loop goes on meanwhile; and what is refused before it is tokenised."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from octavo.errors import RequestError
from octavo.text.tokenizer import Tokenizer

LONG_TEXT_CHARS = 32_768
"""Texts from this length on have a thread of their own: short ones never wait behind them."""

_SHORT_THREADS = 2
T = TypeVar("T")


class TextThreads:
    """Runs work on texts off the event loop."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(_SHORT_THREADS, thread_name_prefix="octavo-text")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="octavo-long-text")

    async def run(self, num_chars: int, function: Callable[..., T], *args: Any) -> T:
        """The function's result, for a text of `num_chars` characters."""
        pool = self._long if num_chars >= LONG_TEXT_CHARS else self._short
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)

    def shutdown(self) -> None:
        """Take no more work; what has begun is not waited for."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)


def check_text(text: str, tokenizer: Tokenizer, max_model_len: int) -> None:
    """Raise RequestError for a text that is no Unicode, or of more characters than the context can hold."""
    width = tokenizer.max_chars_per_token
    if width is not None and len(text) > (limit := width * max_model_len):
        raise RequestError(
            f"The prompt has {len(text)} characters, but no text of more than {limit} fits the model's context of "
            f"{max_model_len} tokens.",
            "prompt",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "The text holds half a surrogate pair, which is no Unicode text."
        raise RequestError(message, "prompt") from None
