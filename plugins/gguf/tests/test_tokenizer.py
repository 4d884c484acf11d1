"""Tokenizers made from metadata."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import CheckpointError
from octavo_gguf.file import GGUFFile
from octavo_gguf.tokenizer import make_tokenizer_files

Metadata = dict[str, Any]
Make = Callable[[Metadata], tuple[tokenizers.Tokenizer, dict[str, Any]]]


@pytest.fixture
def make(tmp_path: Path, write_gguf: Callable[..., Path], tiny_metadata: Metadata) -> Make:
    """The tokenizer and its tokenizer_config.json of metadata that differ from the tiny model's (None: left out)."""

    def build(metadata: Metadata) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
        keys = {k: v for k, v in (tiny_metadata | metadata).items() if v is not None}
        files = make_tokenizer_files(GGUFFile(write_gguf(tmp_path / "m.gguf", keys, {})))
        return tokenizers.Tokenizer.from_buffer(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])

    return build


def _pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """The words that a text is cut into before merging, with spaces and newlines as they are."""
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces]


def test_merges_special_tokens_and_config(make: Make) -> None:
    tokenizer, config = make({"tokenizer.chat_template": "{{ messages }}"})
    assert tokenizer.encode("abcd").tokens == ["abc", "d"]
    assert tokenizer.encode("ab<s>c</s>").ids == [28, 0, 4, 1]
    assert tokenizer.decode([28, 0, 4]) == "abc"
    assert config["bos_token"] == "<s>"
    assert config["eos_token"] == "</s>"
    assert config["add_bos_token"] is False
    assert config["chat_template"] == "{{ messages }}"
    assert config["model_max_length"] == 128


def test_user_defined_tokens_are_kept_in_the_text(make: Make) -> None:
    tokenizer, _ = make({"tokenizer.ggml.token_type": [3, 4, *[1] * 28]})
    assert tokenizer.encode("a</s>").ids == [2, 1]
    assert tokenizer.decode([2, 1, 0]) == "a</s>"


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_a_beginning_is_added_where_the_file_or_its_kind_says(
    make: Make, pre: str, flag: bool | None, begins: bool
) -> None:
    tokenizer, config = make({"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": flag})
    assert tokenizer.encode("ab").ids == ([0, 28] if begins else [28])
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [28]
    assert config["add_bos_token"] is begins


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'ve", " 12345", " X", "'", "LL", " a", "_", "b", "\n\n", "\n", "end"]),
        (None, ["I", "'ve", " 12345", " X", "'", "LL", " a", "_", "b", "\n\n", "\n", "end"]),
        ("smollm", ["I", "'ve", " ", "1", "2", "3", "4", "5", " X", "'", "LL", " a", "_", "b", "\n\n", "\n", "end"]),
        ("llama-bpe", ["I", "'ve", " ", "123", "45", " X", "'LL", " a", "_b", "\n\n\n", "end"]),
        ("qwen2", ["I", "'ve", " ", "1", "2", "3", "4", "5", " X", "'LL", " a", "_b", "\n\n\n", "end"]),
    ],
)
def test_words_are_cut_as_each_model_was_trained(make: Make, pre: str | None, pieces: list[str]) -> None:
    tokenizer, _ = make({"tokenizer.ggml.pre": pre})
    assert _pieces(tokenizer, "I've 12345 X'LL a_b\n\n\nend") == pieces


def test_llama3_takes_whole_words_first(make: Make) -> None:
    """ "abd" is in the vocabulary, but no merge makes it."""
    tokens = ["<s>", "</s>", "a", "b", "d", "ab", "abd"]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1]}
    for pre, found in (("llama-bpe", ["abd"]), ("qwen2", ["ab", "d"])):
        tokenizer, _ = make({**metadata, "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.pre": pre})
        assert tokenizer.encode("abd", add_special_tokens=False).tokens == found


def test_qwen2_composes_characters(make: Make) -> None:
    tokenizer, _ = make({"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.normalizer.normalize_str("e\N{COMBINING ACUTE ACCENT}") == "é"


PIECES = ["\u2581", "a", "b", "c", "\u2581a", "ab", "bc", "abc", "ca", "cab", "\u2581ab"]
SCORES = [-1.0, -2.0, -3.0, -4.0, -9.0, -7.0, -5.0, -12.0, -6.0, -11.0, -8.0]


def _spm_metadata() -> Metadata:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *fallback, *PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + SCORES,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _merge_best_first(text: str) -> list[str]:
    """SentencePiece's rule, plainly: join the neighbours whose union scores best, while any has a score."""
    pieces = list(text)
    score = dict(zip(PIECES, SCORES, strict=True))
    while True:
        joined = [(score.get(a + b, -1e9), -i) for i, (a, b) in enumerate(pairwise(pieces))]
        if not joined or max(joined)[0] == -1e9:
            return pieces
        at = -max(joined)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def test_sentence_piece_merges_by_score(make: Make) -> None:
    tokenizer, config = make(_spm_metadata())

    @given(st.text(alphabet="abc ", max_size=20))
    def check(text: str) -> None:
        wanted = _merge_best_first(("\u2581" + text.replace(" ", "\u2581")) if text else "")
        assert tokenizer.encode(text, add_special_tokens=False).tokens == wanted

    check()
    assert tokenizer.encode("ab").tokens == ["<s>", "\u2581ab"]
    assert config["add_bos_token"] is True


def test_sentence_piece_falls_back_to_bytes_and_back(make: Make) -> None:
    tokenizer, _ = make(_spm_metadata())
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab é\ncab 😀").ids) == "ab é\ncab 😀"


def test_sentence_piece_without_a_first_space(make: Make) -> None:
    tokenizer, _ = make(_spm_metadata() | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab").ids) == " ab"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "of the kind 'rwkv', which is not read"),
        ({"tokenizer.ggml.pre": "mystery"}, "the pre-tokenizer 'mystery' is not known; known ones: gpt-2"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' does not have two parts"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "cannot be built"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "one number for each of the 30 tokens"),
        ({"tokenizer.ggml.eos_token_id": 99}, "the eos token is 99, but there are only 30"),
        (_spm_metadata() | {"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores does not have one number"),
    ],
)
def test_damaged_metadata_is_refused(make: Make, metadata: Metadata, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make(metadata)
