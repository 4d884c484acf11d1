"""The tokenizer in a GGUF file's metadata as the contents of tokenizer.json and tokenizer_config.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from octavo.errors import CheckpointError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octavo_gguf.config import Metadata
from octavo_gguf.file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Values of tokenizer.ggml.token_type."""

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen2 cut a text before merging; they differ in the digits that stay together."""

DIGITS_TOGETHER = {
    "llama-bpe": "{1,3}",
    "llama3": "{1,3}",
    "llama-v3": "{1,3}",
    "qwen2": "",
    "deepseek-r1-qwen": "",
}
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")
"""Pre-tokenizers whose models take a word that is in the vocabulary as it is, without merging."""
GPT2_LIKE = ("gpt-2", "gpt2", "default", "smollm")


class _Source:
    """The tokenizer's metadata, checked: `tokens`, their `types`, and ids of special tokens."""

    def __init__(self, file: GGUFFile) -> None:
        self.path: Path = file.path
        self.values = file.metadata
        self.metadata = Metadata(file.metadata, file.path)
        self.model = file.metadata.get("tokenizer.ggml.model")
        self.pre = file.metadata.get("tokenizer.ggml.pre", "default")
        self.tokens: Sequence[str] = self.strings("tokens")
        self.types: Sequence[int] = self.numbers("token_type", default=NORMAL)

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}.")

    def strings(self, key: str) -> Sequence[str]:
        values = self.values.get(f"tokenizer.ggml.{key}")
        if not isinstance(values, list):
            self.fail(f"tokenizer.ggml.{key} is missing or is no list of strings; convert the model anew")
        return values

    def numbers(self, key: str, default: int | None = None) -> Sequence[Any]:
        """One number for each token."""
        values = self.values.get(f"tokenizer.ggml.{key}")
        if values is None and default is not None:
            return [default] * len(self.tokens)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(self.tokens):
            self.fail(f"tokenizer.ggml.{key} does not have one number for each of the {len(self.tokens)} tokens")
        return values

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.values.get(f"tokenizer.ggml.{key}", default))

    def special(self, kind: str) -> str | None:
        """The text of a special token, None where the file names none."""
        token = self.metadata.token_id(kind)
        if token is None:
            return None
        if token >= len(self.tokens):
            self.fail(f"the {kind} token is {token}, but there are only {len(self.tokens)} tokens")
        return self.tokens[token]

    @property
    def add_bos(self) -> bool:
        return self.flag("add_bos_token", self.model == "llama" or self.pre in WHOLE_WORDS_FIRST)


def make_tokenizer_files(file: GGUFFile) -> Mapping[str, bytes]:
    """tokenizer.json and tokenizer_config.json. Raises CheckpointError for an unknown or damaged tokenizer."""
    source = _Source(file)
    if source.model not in ("gpt2", "llama"):
        source.fail(f"the tokenizer is of the kind {source.model!r}, which is not read; known kinds: gpt2, llama")
    try:
        tokenizer = _byte_level(source) if source.model == "gpt2" else _sentence_piece(source)
        _add_special_tokens(tokenizer, source)
    except CheckpointError:
        raise
    except Exception as error:  # what the tokenizers library raises has no type of its own
        source.fail(f"the tokenizer cannot be built ({error}); convert the model anew")
    config = json.dumps(_tokenizer_config(source), ensure_ascii=False, indent=2)
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": config.encode()}


def _byte_level(source: _Source) -> Tokenizer:
    """A GPT-2 tokenizer: byte-pair merges over words in GPT-2's byte alphabet."""
    vocab = {token: index for index, token in enumerate(source.tokens)}
    merges = [_split_merge(source, merge) for merge in source.strings("merges")]
    whole_words_first = source.pre in WHOLE_WORDS_FIRST
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words_first))
    tokenizer.pre_tokenizer = _pre_tokenizer(source)
    if source.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merge(source: _Source, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space:
        source.fail(f"the merge {merge!r} does not have two parts")
    return left, right


def _pre_tokenizer(source: _Source) -> pre_tokenizers.PreTokenizer:
    if source.pre in DIGITS_TOGETHER:
        words = Regex(_WORDS % DIGITS_TOGETHER[str(source.pre)])
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    if source.pre not in GPT2_LIKE:
        known = ", ".join((*GPT2_LIKE, *DIGITS_TOGETHER))
        source.fail(f"the pre-tokenizer {source.pre!r} is not known; known ones: {known}")
    words_by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if source.pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words_by_bytes])
    return words_by_bytes


def _sentence_piece(source: _Source) -> Tokenizer:
    """A Llama tokenizer: merges in the order of the pieces' scores, bytes for what has no piece."""
    vocab = {token: index for index, token in enumerate(source.tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab, _merges_by_score(source), unk_token=source.special("unknown"), fuse_unk=True, byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    stripped: list[decoders.Decoder] = []
    if source.flag("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        stripped = [decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def _merges_by_score(source: _Source) -> list[tuple[str, str]]:
    """Every way to make a normal piece from two others, the best-scored piece first.

    SentencePiece merges the neighbours whose union has the best score; byte-pair merging does the same when the pairs
    are ranked by that score.
    """
    scores = source.numbers("scores")
    normal = {
        token: score for token, score, kind in zip(source.tokens, scores, source.types, strict=True) if kind == NORMAL
    }
    merges = [
        (-score, token[:cut], token[cut:])
        for token, score in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]


def _add_special_tokens(tokenizer: Tokenizer, source: _Source) -> None:
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(source.tokens, source.types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    bos = source.special("bos")
    if bos is not None and source.add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", f"{bos}:1", "$B:1"],
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )


def _tokenizer_config(source: _Source) -> dict[str, Any]:
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": source.special("bos") is not None and source.add_bos,
        "bos_token": source.special("bos"),
        "eos_token": source.special("eos"),
        "pad_token": source.special("padding"),
        "unk_token": source.special("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.metadata.count("context_length"),
        "chat_template": source.values.get("tokenizer.chat_template"),
    }
    return {key: value for key, value in found.items() if value is not None}
