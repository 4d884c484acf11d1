"""The tokenizer: a model's tokenizer.json run by the tokenizers library, without importing transformers."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from octavo.errors import CheckpointError, RequestError
from octavo.text.chat import Message, render_chat
from octavo.text.streams import ByteStream, TextStream, WindowStream, byte_decoding

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
LENGTH_KEEPING = {"ByteLevel", "Digits", "Split"}
"""Pre-tokenizers that cut a text without dropping any of it."""
SHRINKING = {"Prepend": 1, "Replace": 1, "NFC": 4}
"""Normalizers that are understood here, with the most characters that they make one of."""


class Tokenizer:
    """Text to token ids and back. Safe to share between threads: nothing in it changes."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], chat_template: str | None = None
    ) -> None:
        """`config` is tokenizer_config.json's content."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._names = backend.get_vocab(with_added_tokens=True)
        self._decoding = byte_decoding(backend)
        self._bytes: dict[int, bytes] = {}
        self.chat_template = chat_template
        self.special_tokens = _special_tokens(config)
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self.vocab_size = max(self._names.values(), default=-1) + 1
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self._prepend_bos = bool(config.get("add_bos_token")) and not self._begins_with_bos()

    @classmethod
    def from_files(cls, files: Path | Mapping[str, bytes]) -> "Tokenizer":
        """Build from a directory, or from the contents of its files by name. Raises CheckpointError."""
        contents = _read_files(files) if isinstance(files, Path) else files
        config = _json_object(contents, "special_tokens_map.json") | _json_object(contents, "tokenizer_config.json")
        return cls(_backend(files, contents), config, _chat_template(contents, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens that it spells out are recognised. Raises RequestError."""
        try:
            # Unlike `encode`, this lets other threads run meanwhile.
            (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoded.ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError("The text holds half a surrogate pair, which is no Unicode text.", "prompt") from error
        if add_special_tokens and self._prepend_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that no token has are left out."""
        if self._decoding is None:
            known = [i for i in ids if 0 <= i < self.vocab_size]
            return str(self._backend.decode(known, skip_special_tokens=skip_special_tokens))
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self.special_ids))
        if self._decoding.strips_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def stream(self, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        """A stream of the text that follows a prompt."""
        if self._decoding is None:
            return WindowStream(lambda ids: self.decode(ids, skip_special_tokens), prompt_token_ids)
        hidden = self.special_ids if skip_special_tokens else frozenset()
        begins = not any(i not in hidden for i in prompt_token_ids)
        return ByteStream(lambda i: b"" if i in hidden else self.token_bytes(i), self._decoding.strips_space and begins)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for: part of a character where a token is; empty for an id that no token has."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._make_bytes(token_id)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token on its own as text, special ones too; parts of characters become replacement characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def max_chars_per_token(self) -> int | None:
        """The most characters of a text that one token can take, None where there is no limit.

        Characters that no token has, and space that a special token takes in around itself, are not counted.
        """
        shrinking = _shrinking(self._backend)
        return None if shrinking is None else shrinking * max(map(len, self._names), default=1)

    def render_chat(self, messages: Sequence[Message], template: str | None = None, **kwargs: Any) -> str:
        """The text of a chat by `template`, the model's own by default; see octavo.text.chat.render_chat."""
        template = template or self.chat_template
        if template is None:
            raise RequestError("The model has no chat template: ask for a completion, or give a template.", "messages")
        return render_chat(template, messages, **{**self.special_tokens, **kwargs})

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of a chat, ready to be continued by the assistant. Raises RequestError."""
        text = self.render_chat(messages, template, add_generation_prompt=add_generation_prompt, **kwargs)
        return self.encode(text, add_special_tokens=False)

    def _make_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:  # a model's vocabulary may be padded
            return b""
        if self._decoding is None:
            return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._decoding.to_bytes(token)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._names.get(token)

    def _begins_with_bos(self) -> bool:
        return self._backend.encode("", add_special_tokens=True).ids[:1] == [self.bos_token_id]


def _read_files(directory: Path) -> dict[str, bytes]:
    try:
        return {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
    except OSError as error:
        raise CheckpointError(f"The tokenizer in {directory} cannot be read: {error}.") from error


def _json_object(contents: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(contents.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}. Fetch the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds {type(content).__name__}, but must hold a JSON object.")
    return content


def _backend(files: Path | Mapping[str, bytes], contents: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    if "tokenizer.json" in contents:
        try:
            return tokenizers.Tokenizer.from_buffer(contents["tokenizer.json"])
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"tokenizer.json is damaged or of an unknown kind: {error}.") from error
    if not isinstance(files, Path):
        raise CheckpointError("The checkpoint has no tokenizer.json: name a directory that has one with --tokenizer.")
    return _converted_backend(files)


def _converted_backend(directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a directory in an older form, which transformers converts (it takes seconds to import)."""
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except Exception as error:  # of many kinds, from a missing file to a missing package
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{directory} has no tokenizer.json, and transformers cannot make one of its files: {lines[0]}. "
            "Name a directory with a tokenizer.json with --tokenizer."
        ) from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


def _chat_template(contents: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in contents:
        return contents["chat_template.jinja"].decode("utf-8", "replace")
    found = _json_object(contents, "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of bos_token and the like, which are strings or objects with their content."""
    values = {name: config.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _shrinking(backend: tokenizers.Tokenizer) -> int | None:
    """How many characters of a text one character of a token can stand for, None where that is not known."""
    model = backend.model
    if not isinstance(model, models.BPE):
        return None
    cuts = {step["type"] for step in _steps(backend.pre_tokenizer, "pretokenizers")}
    if cuts - LENGTH_KEEPING or not ("ByteLevel" in cuts or model.byte_fallback):
        return None
    steps = _steps(backend.normalizer, "normalizers")
    factors = [SHRINKING.get(step["type"]) for step in steps]
    if None in factors or any(step["type"] == "Replace" and not _keeps_length(step) for step in steps):
        return None
    return max((factor for factor in factors if factor), default=1)


def _keeps_length(replace: Mapping[str, Any]) -> bool:
    pattern = replace["pattern"].get("String")
    return pattern is not None and len(pattern) <= len(replace["content"])


def _steps(component: Any, inner: str) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, those of a sequence one by one."""
    if component is None:
        return []
    settings = json.loads(component.__getstate__())
    return list(settings[inner]) if settings["type"] == "Sequence" else [settings]
