"""A provider's options: "triton:splits=8,mode=fast" made an object of the provider's dataclass type."""

from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from octavo.errors import ConfigError
from octavo.plugins.registry import LoadedProvider
from octavo.plugins.values import convert as convert_value
from octavo.plugins.values import nearest


def split_reference(text: str) -> tuple[str, dict[str, str]]:
    """Split "name:option=value,option=value" into the name and the options' text. Raises ConfigError."""
    name, _, rest = text.strip().partition(":")
    given: dict[str, str] = {}
    for piece in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not key or not equals:
            raise ConfigError(f"{text!r} holds {piece!r}, but options are written name:option=value,option=value.")
        key = key.replace("-", "_")
        if key in given:
            raise ConfigError(f"{text!r} gives the option {key!r} twice: leave one out.")
        given[key] = value
    if not name:
        raise ConfigError(f"{text!r} has no name before its options: write name:option=value.")
    return name, given


def make_options(loaded: LoadedProvider, given: dict[str, str]) -> Any:
    """The provider's options object, or None for a provider that has no options.

    Raises ConfigError for an unknown, missing or bad option, listing those there are.
    """
    if loaded.options is None:
        if given:
            raise ConfigError(f"The {loaded} takes no options, but was given {', '.join(given)}: leave them out.")
        return None
    hints = get_type_hints(loaded.options)
    known = {item.name: item for item in fields(loaded.options) if item.init}
    for name in given:
        if name not in known:
            raise ConfigError(f"The {loaded} has no option {name!r}. {_listed(known, hints)}{nearest(name, known)}")
    missing = [name for name, item in known.items() if _required(item) and name not in given]
    if missing:
        raise ConfigError(f"The {loaded} needs the option {', '.join(missing)}. {_listed(known, hints)}")
    values = {
        name: convert_value(text, hints[name], f"The option {name!r} of the {loaded}") for name, text in given.items()
    }
    try:
        return loaded.options(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The {loaded} refuses its options: {error}.") from error


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _listed(known: dict[str, Field[Any]], hints: dict[str, Any]) -> str:
    if not known:
        return "It has no options."
    shown = [f"{name} ({getattr(hints[name], '__name__', hints[name])}{_default(known[name])})" for name in known]
    return f"Its options: {', '.join(shown)}."


def _default(item: Field[Any]) -> str:
    return ", required" if _required(item) else f", default {item.default}" if item.default is not MISSING else ""
