"""Text out of sampled tokens as they come, cut at the stop strings of the request."""

from collections.abc import Sequence
from io import StringIO

from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer


class _StopMatcher:
    """Looks for one string in a text given one character at a time (Knuth, Morris, Pratt 1977).

    `matched` is the length of the longest end of the text that the string begins with, short of the whole string.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._borders = [0] * len(pattern)
        for index in range(1, len(pattern)):
            self._borders[index] = self._extend(self._borders[index - 1], pattern[index])

    def found(self, char: str) -> bool:
        """Take the next character; whether it completes the string."""
        self.matched = self._extend(self.matched, char)
        if self.matched < len(self.pattern):
            return False
        self.matched = self._borders[-1]
        return True

    def _extend(self, length: int, char: str) -> int:
        while length and self.pattern[length] != char:
            length = self._borders[length - 1]
        return length + (self.pattern[length] == char)


class Detokenizer:
    """The text of one choice of a request, in time linear in its length.

    The stop string that is complete first ends the text, the longest of those that are complete at one character.
    `stop_reason` is that string. `num_tokens` counts tokens up to the one that completed it. Later tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self._stream = tokenizer.stream(prompt_token_ids, params.skip_special_tokens)
        self._matchers = [_StopMatcher(stop) for stop in params.stop]
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._buffer = StringIO()
        self._length = 0
        self._shown = 0
        self.num_tokens = 0
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """All text so far, what is held back included; cut at the stop string."""
        return self._buffer.getvalue()

    def push(self, token_ids: Sequence[int]) -> str:
        """Take new tokens and return the new text that no later token can change or cut off."""
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            self._append(self._stream.push(token_id))
        return self._show(self._length - self._num_held())

    def finish(self) -> str:
        """No more tokens come: return the text that was held back."""
        if self.stop_reason is None:
            self._append(self._stream.flush())
        return self._show(self._length)

    def _num_held(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        if self.stop_reason is not None:
            return 0
        return max((matcher.matched for matcher in self._matchers), default=0)

    def _show(self, end: int) -> str:
        if end <= self._shown:
            return ""
        self._buffer.seek(self._shown)
        piece = self._buffer.read(end - self._shown)
        self._shown = end
        return piece

    def _append(self, piece: str) -> None:
        keep = self._scan(piece) if self._matchers else len(piece)
        self._buffer.seek(self._length)
        self._buffer.write(piece[:keep])
        self._length += keep
        if self.stop_reason is not None and not self._include_stop:
            self._length -= len(self.stop_reason)
            self._buffer.truncate(self._length)

    def _scan(self, piece: str) -> int:
        """How many characters of `piece` belong to the text: all of them, or up to the end of a stop string."""
        for index, char in enumerate(piece):
            complete = [matcher.pattern for matcher in self._matchers if matcher.found(char)]
            if complete and self.num_tokens > self._min_tokens:
                self.stop_reason = max(complete, key=len)
                return index + 1
        return len(piece)
