"""The tokenizer: from files of every kind, special tokens, and agreement with the library that it runs."""

import json
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from octavo.errors import CheckpointError, RequestError
from octavo.text.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

SAMPLE = ["the quick brown fox jumps over the lazy dog, the end", "naïve café 日本語 😀😀 and 42 more"] * 3


def _train(vocab_size: int = 330) -> tokenizers.Tokenizer:
    """A small byte-level tokenizer with special tokens and an ordinary added one."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SAMPLE, trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


BYTE_LEVEL = _train()
SIZE = BYTE_LEVEL.get_vocab_size()
TOOL = SIZE - 1
CONFIG = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}


def _sentence_piece(strip: bool = True) -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("\u2581", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def _files(config: dict[str, Any] | None = None, others: Mapping[str, str] | None = None) -> dict[str, bytes]:
    contents = {"tokenizer.json": BYTE_LEVEL.to_str(), "tokenizer_config.json": json.dumps(CONFIG | (config or {}))}
    return {name: text.encode() for name, text in {**contents, **(others or {})}.items()}


def _write(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_from_a_directory_and_from_contents(tmp_path: Path) -> None:
    for files in (_files(), _write(tmp_path, _files())):
        tokenizer = Tokenizer.from_files(files)
        assert tokenizer.decode(tokenizer.encode("the fox 😀")) == "the fox 😀"
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
        assert tokenizer.special_ids == {0, 1}
        assert tokenizer.vocab_size == SIZE
        assert tokenizer.chat_template is None


def test_special_tokens_in_a_text_are_recognised() -> None:
    tokenizer = Tokenizer.from_files(_files())
    ids = tokenizer.encode("<s>the</s><tool>", add_special_tokens=False)
    assert (ids[0], ids[-2:]) == (0, [1, TOOL])
    assert tokenizer.decode(ids) == "the<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>the</s><tool>"


def test_special_tokens_map_names_what_the_config_does_not() -> None:
    tokens = json.dumps({"eos_token": "</s>", "bos_token": "</s>"})
    files = _files(others={"tokenizer_config.json": '{"bos_token": "<s>"}', "special_tokens_map.json": tokens})
    tokenizer = Tokenizer.from_files(files)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_special_tokens_that_are_not_there_are_none() -> None:
    tokenizer = Tokenizer.from_files(_files({"bos_token": None, "eos_token": "<nowhere>"}))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)


@pytest.mark.parametrize(
    ("flag", "template", "first"), [(True, False, 1), (True, True, 1), (False, False, 0), (None, True, 1)]
)
def test_a_beginning_is_added_exactly_once(flag: bool | None, template: bool, first: int) -> None:
    """`template` is whether tokenizer.json adds it itself."""
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer.from_files(_files({"add_bos_token": flag}, {"tokenizer.json": backend.to_str()}))
    assert tokenizer.encode("fox")[:2].count(0) == first
    assert 0 not in tokenizer.encode("fox", add_special_tokens=False)


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    tokenizer = Tokenizer.from_files(_files(others={"tokenizer.json": backend.to_str()}))
    text = "abcdefgh" * 3
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_on_their_own() -> None:
    tokenizer = Tokenizer.from_files(_files())
    first, *rest = tokenizer.encode("ü")  # in no sample, so two bytes
    assert [tokenizer.token_bytes(i) for i in (first, *rest)] == [b"\xc3", b"\xbc"]
    assert tokenizer.token_text(first) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.token_text(1) == "</s>"
    the = BYTE_LEVEL.token_to_id("Ġthe")
    assert the is not None
    assert tokenizer.token_text(the) == " the"
    assert [tokenizer.token_bytes(i) for i in (-1, SIZE, 1 << 40)] == [b"", b"", b""]
    assert tokenizer.decode([the, SIZE]) == " the"


@given(st.lists(st.integers(0, TOOL), max_size=40), st.booleans())
def test_decoding_bytes_equals_the_library(ids: list[int], skip: bool) -> None:
    tokenizer = Tokenizer(BYTE_LEVEL, CONFIG)
    assert tokenizer.decode(ids, skip) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("strip", [True, False])
def test_decoding_sentence_pieces_equals_the_library(strip: bool) -> None:
    backend = _sentence_piece(strip)
    tokenizer = Tokenizer(backend, CONFIG)

    @given(st.text(alphabet=" abé😀\n", max_size=20), st.booleans())
    def check(text: str, skip: bool) -> None:
        ids = [1, *tokenizer.encode(text), 2]
        assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)

    check()
    assert (
        tokenizer.decode([5 - 2 + 0x41, 3 + 0xFF, 3 + 0x42]) == "A\N{REPLACEMENT CHARACTER}B"
    )  # the library loses A and B


@given(st.text(max_size=60))
def test_no_text_is_longer_than_its_tokens_allow(text: str) -> None:
    composing = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    composing.normalizer = normalizers.NFC()
    for backend in (BYTE_LEVEL, composing, _sentence_piece()):
        tokenizer = Tokenizer(backend, CONFIG)
        assert tokenizer.max_chars_per_token is not None
        assert len(text) <= tokenizer.max_chars_per_token * len(tokenizer.encode(text))


def test_the_limit_counts_what_a_character_may_be_composed_of() -> None:
    """The alpha with three marks is one character after normalization, and could be one token."""
    four = "\N{GREEK SMALL LETTER ALPHA WITH PSILI AND VARIA AND YPOGEGRAMMENI}"
    assert len(unicodedata.normalize("NFD", four)) == 4
    longest = Tokenizer(BYTE_LEVEL, CONFIG).max_chars_per_token
    assert longest == max(len(token) for token in BYTE_LEVEL.get_vocab())
    composing = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    composing.normalizer = normalizers.NFC()
    assert Tokenizer(composing, CONFIG).max_chars_per_token == 4 * longest


@pytest.mark.parametrize(
    "change",
    [
        ("normalizer", normalizers.Strip()),
        ("normalizer", normalizers.Replace("aa", "")),
        ("normalizer", normalizers.Replace(tokenizers.Regex("a+"), "a")),
        ("pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
        ("model", models.WordLevel({"a": 0}, unk_token="a")),
    ],
)
def test_no_limit_is_given_where_text_may_vanish(change: tuple[str, Any]) -> None:
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_str())
    setattr(backend, *change)
    assert Tokenizer(backend, {}).max_chars_per_token is None


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(RequestError, match="half a surrogate pair"):
        Tokenizer(BYTE_LEVEL, CONFIG).encode("a\ud800")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (_files(others={"tokenizer.json": "{"}), r"tokenizer\.json is damaged or of an unknown kind"),
        (_files(others={"tokenizer_config.json": "{"}), r"tokenizer_config\.json is not valid JSON"),
        (_files(others={"tokenizer_config.json": "[]"}), r"tokenizer_config\.json holds list"),
        ({}, r"has no tokenizer\.json: name a directory"),
    ],
)
def test_damaged_files_are_refused(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_files(files)


TEMPLATES = {
    "in the config": {"tokenizer_config.json": '{"chat_template": "T"}'},
    "several in the config": {
        "tokenizer_config.json": '{"chat_template": [{"name": "x"}, {"name": "default", "template": "T"}]}'
    },
    "a jinja file": {"chat_template.jinja": "T", "tokenizer_config.json": '{"chat_template": "old"}'},
    "a json file": {"chat_template.json": '{"chat_template": "T"}'},
}


@pytest.mark.parametrize("place", TEMPLATES)
def test_the_chat_template_is_found(place: str) -> None:
    assert Tokenizer.from_files(_files(others=TEMPLATES[place])).chat_template == "T"


def test_a_chat_is_encoded_as_its_template_writes_it() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer.from_files(_files({"chat_template": template, "add_bos_token": True}))
    messages = [{"role": "user", "content": "the fox"}]
    fox = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode_chat(messages) == [0, *fox, 1]
    assert tokenizer.encode_chat(messages, template="{{ add_generation_prompt }}") == tokenizer.encode(
        "True", add_special_tokens=False
    )
    assert (
        tokenizer.render_chat(messages, "{{ add_generation_prompt }}{{ x }}", add_generation_prompt=False, x=3)
        == "False3"
    )


def test_a_model_without_a_template_refuses_chats() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer.from_files(_files()).encode_chat([{"role": "user", "content": "x"}])


def test_older_files_are_converted_by_transformers(tmp_path: Path) -> None:
    settings = json.loads(BYTE_LEVEL.to_str())["model"]
    files = {
        "vocab.json": json.dumps(settings["vocab"]),
        "merges.txt": "\n".join(" ".join(pair) for pair in settings["merges"]),
        "tokenizer_config.json": json.dumps(CONFIG | {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<s>"}),
    }
    _write(tmp_path, {name: text.encode() for name, text in files.items()})
    tokenizer = Tokenizer.from_files(tmp_path)
    assert tokenizer.encode("the quick fox") == BYTE_LEVEL.encode("the quick fox").ids


def test_a_directory_with_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        Tokenizer.from_files(tmp_path)


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    _write(tmp_path, _files({"chat_template": "x"}))
    code = (
        "import sys; from pathlib import Path\n"
        "from octavo.text.tokenizer import Tokenizer\n"
        "import octavo.text.detokenizer\n"
        "tokenizer = Tokenizer.from_files(Path(sys.argv[1]))\n"
        "assert tokenizer.encode_chat([{'role': 'user', 'content': ''}])\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
