"""From token ids to text, one token at a time.

The tokens of most tokenizers stand for bytes, which are joined and read as UTF-8: a stream need only keep the bytes of
an unfinished character. Others are decoded with a few tokens of context.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 5
MAX_UNFINISHED_TOKENS = 6
"""A character has at most four bytes; a text that ends in a replacement character for longer than this means it."""

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream(Protocol):
    """Text of a growing sequence of tokens. The pieces and the last flush together are the text of them all."""

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come: empty while a character is unfinished."""

    def flush(self) -> str:
        """The rest: an unfinished character as a replacement character."""


@cache
def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's vocabulary: printable ones for themselves, others moved up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(256 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


def _byte_level_bytes(token: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()  # an added token, written as it is


@dataclass(frozen=True, slots=True)
class ByteDecoding:
    """How tokens stand for bytes: `to_bytes` of a token's name; whether a text's first space is dropped."""

    to_bytes: Callable[[str], bytes]
    strips_space: bool = False


def byte_decoding(backend: tokenizers.Tokenizer) -> ByteDecoding | None:
    """How the tokenizer's tokens stand for bytes, None where its decoder is of another kind."""
    if backend.decoder is None:
        return None
    steps = _flat_steps(json.loads(backend.decoder.__getstate__()))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteDecoding(_byte_level_bytes)
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    pattern, content = steps[0]["pattern"].get("String"), steps[0]["content"]
    strips = bool(steps[3:])
    if pattern is None or (strips and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) != (" ", 1, 0)):
        return None

    def to_bytes(token: str) -> bytes:
        match = _FALLBACK_BYTE.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token.replace(pattern, content).encode()

    return ByteDecoding(to_bytes, strips)


def _flat_steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat_steps(inner)]


class ByteStream:
    """The stream of tokens that stand for bytes. `drop_space` drops a space that begins the text."""

    def __init__(self, token_bytes: Callable[[int], bytes], drop_space: bool) -> None:
        self._token_bytes = token_bytes
        self._drop_space = drop_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` finishes."""
        data = self._token_bytes(token_id)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """A replacement character for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """The stream of any other tokenizer: each piece is what a token adds to the text of the few before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._shown = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        """What the new tokens add, once they end in a whole character."""
        self._new.append(token_id)
        text = self._decode(self._shown + self._new)
        if text.endswith(REPLACEMENT) and len(self._new) < MAX_UNFINISHED_TOKENS:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is held back."""
        return self._advance(self._decode(self._shown + self._new))

    def _advance(self, text: str) -> str:
        piece = text[len(self._decode(self._shown)) :]
        if piece:  # tokens without text, such as special ones, are no context
            self._shown = (self._shown + self._new)[-CONTEXT_TOKENS:]
        self._new = []
        return piece
