"""Text and loose values (from flags, the environment, YAML, keyword arguments) made values of a declared type."""

import json
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from fractions import Fraction
from typing import Any, Union, get_args, get_origin

from octavo.errors import ConfigError

_DECIMAL = {"k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_FACTORS = {"": 1, **_DECIMAL, **_BINARY}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that suggests the known name nearest to `word`, led by a space; empty where none is near."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def split_list(text: str) -> tuple[str, ...]:
    """Split "triton:splits=8,mode=fast,torch" into its entries; `name=value` belongs to the entry before it."""
    entries: list[str] = []
    for piece in filter(None, (part.strip() for part in text.split(","))):
        key, equals, _ = piece.partition("=")
        if entries and equals and ":" not in key:
            entries[-1] += f",{piece}"
        else:
            entries.append(piece)
    return tuple(entries)


def parse_size(text: str, source: str = "The size") -> int:
    """A count with a suffix: k m g t are decimal (32k = 32000), K M G T binary (32K = 32768). Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip())
    number = Fraction(match[1]) * _FACTORS[match[2]] if match else Fraction(1, 2)
    if number.denominator != 1:
        raise ConfigError(
            f"{source} is {text!r}, but must be a whole number, such as 4096, 32k (32000) or 32K (32768)."
        )
    return number.numerator


def _fail(source: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{source} is {value!r}, but must be {wanted}.")


def _to_bool(value: object, source: str, size: bool) -> bool:
    word = _WORDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(word, bool):
        raise _fail(source, value, "true or false")
    return word


def _to_int(value: object, source: str, size: bool) -> int:
    if isinstance(value, str):
        if size:
            return parse_size(value, source)
        if re.fullmatch(r"[+-]?\d+", value.strip()):
            return int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _fail(source, value, "a whole number")


def _to_float(value: object, source: str, size: bool) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise _fail(source, value, "a number")


def _to_str(value: object, source: str, size: bool) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    raise _fail(source, value, "text (in quotes, where it looks like something else)")


def _to_tuple(value: object, source: str, size: bool) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
        raise _fail(source, value, "a list of names, such as a,b")
    return tuple(name for entry in entries for name in split_list(entry))


def _to_dict(value: object, source: str, size: bool) -> dict[str, Any]:
    content = value
    if isinstance(value, str):
        try:
            content = json.loads(value)
        except ValueError:
            content = None
    if not isinstance(content, dict):
        raise _fail(source, value, 'a JSON object, such as {"name": 1}')
    return content


_CONVERTERS: dict[Any, Callable[[object, str, bool], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    tuple: _to_tuple,
    Mapping: _to_dict,
}


def base_type(hint: Any) -> tuple[Any, bool]:
    """The plain type of a hint (tuple for tuple[str, ...]) and whether None is allowed too."""
    optional = get_origin(hint) in (types.UnionType, Union) and type(None) in get_args(hint)
    if optional:
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return get_origin(hint) or hint, optional


def convert(value: object, hint: Any, source: str, size: bool = False) -> Any:
    """Make `value` one of type `hint`: bool, int, float, str, tuple[str, ...], Mapping, or one of these or None.

    `source` names the value in errors; `size` allows suffixes such as 32k. Raises ConfigError.
    """
    base, optional = base_type(hint)
    if optional and (value is None or (isinstance(value, str) and _means_none(value, base))):
        return None
    if base not in _CONVERTERS:
        known = "bool, int, float, str, tuple and Mapping"
        raise ConfigError(f"{source} has type {hint}, which text cannot give: only {known}.")
    return _CONVERTERS[base](value, source, size)


def _means_none(value: str, base: Any) -> bool:
    return value.lower() == "none" or (base is int and value.lower() == "auto")
