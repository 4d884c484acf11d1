"""Options of a provider, from the text of a flag."""

from dataclasses import dataclass
from typing import Any

import pytest
from octavo.errors import ConfigError
from octavo.plugins.options import make_options, split_reference
from octavo.plugins.records import Provider
from octavo.plugins.registry import LoadedPlugin, LoadedProvider
from octavo.plugins.values import convert, parse_size, split_list


@dataclass(frozen=True)
class Options:
    """One of every type."""

    splits: int = 4
    ratio: float = 0.5
    fast: bool = False
    mode: str = "plain"
    limit: int | None = 9

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ValueError("splits must be positive")


@dataclass(frozen=True)
class Needy:
    """Has an option without a default."""

    table: str


def provider(options: type | None) -> LoadedProvider:
    record = Provider(name="quick", factory="nowhere:Quick", summary="quick", options=options)
    return LoadedProvider.of("attention", record, LoadedPlugin("fast", "fast-kernels", "2.0", "fast.plugin"))


def options_of(text: str, options: type | None = Options) -> Any:
    return make_options(provider(options), split_reference(text)[1])


def test_every_type_is_read() -> None:
    text = "quick:splits=8,ratio=0.25,fast=yes,mode=a:b,limit=none"
    assert split_reference(text)[0] == "quick"
    assert options_of(text) == Options(splits=8, ratio=0.25, fast=True, mode="a:b", limit=None)
    assert options_of("quick") == Options()


def test_a_provider_without_options_gets_none() -> None:
    assert options_of("quick", None) is None
    with pytest.raises(ConfigError, match=r"'quick' of plugin 'fast' .* takes no options, but was given splits"):
        options_of("quick:splits=2", None)


def test_unknown_and_missing_options_list_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no option 'split'\. Its options: splits \(int, default 4\).*'splits'"):
        options_of("quick:split=2")
    with pytest.raises(ConfigError, match=r"needs the option table\. Its options: table \(str, required\)"):
        options_of("quick", Needy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quick:splits=two", "'splits' .* is 'two', but must be a whole number"),
        ("quick:ratio=half", "must be a number"),
        ("quick:fast=perhaps", "must be true or false"),
        ("quick:splits=0", "refuses its options: splits must be positive"),
        ("quick:fast", "options are written name:option=value"),
        ("quick:splits=1,splits=2", "twice"),
        (":splits=1", "no name"),
    ],
)
def test_bad_options_are_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options_of(text)


def test_a_list_keeps_options_with_their_provider() -> None:
    assert split_list("triton:splits=8,mode=fast,torch") == ("triton:splits=8,mode=fast", "torch")
    assert split_list("a:x=1,b:y=2, c ,") == ("a:x=1", "b:y=2", "c")
    assert split_list("") == ()


@pytest.mark.parametrize(
    ("text", "size"),
    [("32k", 32_000), ("32K", 32_768), ("1.5G", 3 << 29), ("25.6k", 25_600), ("7", 7), ("2T", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["32kb", "-1", "1.5", "k", "", "1e3", "0.0001k"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a whole number"):
        parse_size(text, "max_model_len")


@pytest.mark.parametrize(
    ("value", "hint"),
    [(True, int), (1.0, int), ("1.0", int), (1, bool), (True, float), (3, str), (3, tuple[str, ...]), ([3], tuple)],
)
def test_values_of_another_type_are_refused(value: object, hint: Any) -> None:
    with pytest.raises(ConfigError, match="The value is"):
        convert(value, hint, "The value")


def test_a_type_that_text_cannot_give_is_said() -> None:
    with pytest.raises(ConfigError, match="only bool, int"):
        convert("x", dict[str, int], "The option")
