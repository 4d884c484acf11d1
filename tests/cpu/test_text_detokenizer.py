"""The detokenizer: pieces that add up to the text, and stop strings as a plain search finds them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from octavo.sampling_params import SamplingParams
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer
from tokenizers import decoders, models, pre_tokenizers

SPECIAL = 1
WORDS = ["a", "b", "ab", "ba", "aab", "bb", "abba", " ", " a"]


def _byte_level() -> Tokenizer:
    """All bytes, some words of a and b, and a special token."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(w.replace(" ", "Ġ") for w in WORDS if len(w) > 1)]
    backend = tokenizers.Tokenizer(
        models.BPE({name: 2 + i for i, name in enumerate(names)} | {"<s>": 0, "</s>": 1}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def _sentence_piece() -> Tokenizer:
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(w.replace(" ", "\u2581") for w in WORDS)]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    steps: list[Any] = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def _metaspace() -> Tokenizer:
    """A decoder that is not about bytes: decoded with context."""
    names = ["<unk>", "</s>", *(w.replace(" ", "\u2581") for w in WORDS)]
    backend = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


BYTE_LEVEL, SENTENCE_PIECE, METASPACE = _byte_level(), _sentence_piece(), _metaspace()
WORD_IDS = [BYTE_LEVEL.encode(w)[0] if len(w) == 1 else BYTE_LEVEL._names[w.replace(" ", "Ġ")] for w in WORDS]

any_ids = st.lists(st.integers(0, BYTE_LEVEL.vocab_size), max_size=40)
word_ids = st.lists(st.sampled_from([*WORD_IDS, SPECIAL]), max_size=40)
stops = st.lists(st.text(alphabet="ab ", min_size=1, max_size=5), max_size=4).map(tuple)


def _chunks(ids: Sequence[int], data: st.DataObject) -> list[list[int]]:
    chunks, rest = [], list(ids)
    while rest:
        size = data.draw(st.integers(1, 4))
        chunks.append(rest[:size])
        rest = rest[size:]
    return chunks


@given(any_ids, st.booleans(), st.sampled_from([BYTE_LEVEL, SENTENCE_PIECE, METASPACE]), st.data())
def test_pieces_add_up_to_the_text(ids: list[int], skip: bool, tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = [i for i in ids if i < tokenizer.vocab_size]
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
    pieces = [detokenizer.push(chunk) for chunk in _chunks(ids, data)]
    whole = tokenizer.decode(ids, skip)
    shown = "".join(pieces)
    assert whole.startswith(shown)
    assert len(whole) - len(shown) <= 3  # no more than an unfinished character is held back
    assert shown + detokenizer.finish() == whole == detokenizer.text
    assert detokenizer.finish() == ""
    assert (detokenizer.num_tokens, detokenizer.stop_reason) == (len(ids), None)


@given(st.text(max_size=20))
def test_no_piece_holds_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams())
    ids = BYTE_LEVEL.encode(text)
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(pieces) == text
    assert detokenizer.finish() == ""


@dataclass
class Ending:
    """What a plain search says of a whole text."""

    text: str
    reason: str | None
    num_tokens: int


def _search(texts: list[str], params: SamplingParams) -> Ending:
    """`texts` are those of the first 1, 2, ... tokens. The first stop string to end wins, of several the longest."""
    whole = texts[-1] if texts else ""
    for end in range(1, len(whole) + 1):
        found = [stop for stop in params.stop if whole[:end].endswith(stop)]
        num_tokens = next(n for n, text in enumerate(texts, 1) if len(text) >= end)
        if found and num_tokens > params.min_tokens:
            stop = max(found, key=len)
            cut = end if params.include_stop_str_in_output else end - len(stop)
            return Ending(whole[:cut], stop, num_tokens)
    return Ending(whole, None, len(texts))


def _held_back(text: str, params: SamplingParams) -> int:
    """How many characters at the end of a text could begin a stop string."""
    lengths = range(1, len(text) + 1)
    return max((n for n in lengths for stop in params.stop if len(stop) > n and stop.startswith(text[-n:])), default=0)


@given(word_ids, stops, st.integers(0, 8), st.booleans())
def test_stop_strings_are_those_of_a_plain_search(
    ids: list[int], stop: tuple[str, ...], low: int, include: bool
) -> None:
    params = SamplingParams(stop=stop, min_tokens=low, max_tokens=None, include_stop_str_in_output=include)
    texts = [BYTE_LEVEL.decode(ids[: n + 1]) for n in range(len(ids))]
    wanted = _search(texts, params)
    detokenizer = Detokenizer(BYTE_LEVEL, params)
    shown = ""
    for number, token in enumerate(ids, 1):
        shown += detokenizer.push([token])
        if number < wanted.num_tokens or wanted.reason is None:
            assert detokenizer.stop_reason is None
            assert shown == texts[number - 1][: len(texts[number - 1]) - _held_back(texts[number - 1], params)]
        else:
            assert shown == wanted.text
    assert shown + detokenizer.finish() == wanted.text == detokenizer.text
    assert (detokenizer.stop_reason, detokenizer.num_tokens) == (wanted.reason, wanted.num_tokens)


@given(word_ids, stops, st.data())
def test_chunks_do_not_matter(ids: list[int], stop: tuple[str, ...], data: st.DataObject) -> None:
    one, many = (Detokenizer(BYTE_LEVEL, SamplingParams(stop=stop)) for _ in range(2))
    texts = [one.push(ids) + one.finish()]
    texts.append("".join(many.push(chunk) for chunk in _chunks(ids, data)) + many.finish())
    assert texts[0] == texts[1]
    assert (one.text, one.num_tokens, one.stop_reason) == (many.text, many.num_tokens, many.stop_reason)


@given(any_ids, st.text(min_size=1, max_size=3))
def test_stop_strings_in_text_of_any_bytes(ids: list[int], stop: str) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=(stop,)))
    text = detokenizer.push(ids) + detokenizer.finish()
    whole = BYTE_LEVEL.decode(ids)
    assert text == (whole[: whole.index(stop)] if stop in whole else whole)


def test_after_a_stop_nothing_is_shown_or_counted() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=("b",)))
    ids = BYTE_LEVEL.encode("aabaa")
    assert detokenizer.push(ids) == "aa"
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == ""
    assert (detokenizer.text, detokenizer.num_tokens, detokenizer.stop_reason) == ("aa", 3, "b")


def test_a_stop_string_may_begin_within_min_tokens() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=("aab",), min_tokens=2))
    assert [detokenizer.push(BYTE_LEVEL.encode(char)) for char in "aab"] == ["", "", ""]
    assert (detokenizer.text, detokenizer.stop_reason) == ("", "aab")


@pytest.mark.parametrize("stop", [("b", "ab"), ("ab", "b")])
def test_the_longest_of_those_that_end_together_wins(stop: tuple[str, ...]) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=stop))
    assert detokenizer.push(BYTE_LEVEL.encode("aab")) == "a"
    assert detokenizer.stop_reason == "ab"


def test_a_stop_string_that_came_too_early_may_overlap_the_one_that_counts() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=("aa",), min_tokens=2))
    assert detokenizer.push(BYTE_LEVEL.encode("aaab")) == "a"
    assert (detokenizer.num_tokens, detokenizer.stop_reason) == (3, "aa")


@pytest.mark.parametrize(("prompt", "text"), [((), "a b"), ((SPECIAL,), "a b"), ((258,), " a b")])
def test_the_first_space_belongs_to_the_beginning_only(prompt: tuple[int, ...], text: str) -> None:
    """SentencePiece writes a space before a text; after a prompt it is a space of the text."""
    space_a, space, b = (SENTENCE_PIECE._names[name] for name in ("\u2581a", "\u2581", "b"))
    detokenizer = Detokenizer(SENTENCE_PIECE, SamplingParams(), prompt)
    assert detokenizer.push([space_a, space, b]) == text


def test_context_decoding_keeps_spaces_after_a_prompt() -> None:
    ids = [METASPACE._names[name] for name in ("\u2581a", "b", "\u2581a")]
    assert Detokenizer(METASPACE, SamplingParams(), ids[:1]).push(ids[1:]) == "b a"
    assert Detokenizer(METASPACE, SamplingParams()).push(ids) == "ab a"
    assert Detokenizer(METASPACE, SamplingParams()).push([*ids, *[SPECIAL] * 9, ids[0]]) == "ab a a"


def test_special_tokens_are_shown_on_request() -> None:
    ids = [*BYTE_LEVEL.encode("a"), SPECIAL]
    assert Detokenizer(BYTE_LEVEL, SamplingParams(stop=("x",))).push(ids) == "a"
    assert Detokenizer(BYTE_LEVEL, SamplingParams(skip_special_tokens=False)).push(ids) == "a</s>"
    stopped = Detokenizer(BYTE_LEVEL, SamplingParams(skip_special_tokens=False, stop=("</s>",)))
    assert (stopped.push(ids), stopped.stop_reason) == ("a", "</s>")


def test_time_is_linear() -> None:
    """The end of the text always begins the stop string: a search from anew at each token would take minutes."""
    length = 60_000
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop=("a" * (length - 1) + "b",)))
    (token,) = BYTE_LEVEL.encode("a")
    start = time.perf_counter()
    shown = "".join(detokenizer.push([token]) for _ in range(length))
    assert time.perf_counter() - start < 20
    assert shown == "a"
    assert detokenizer.finish() == "a" * (length - 1)
