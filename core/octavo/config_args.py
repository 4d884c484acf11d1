"""The configuration's flags: made from its fields, resolved as flags > environment > YAML > defaults.

The functions take any dataclass of `documented` fields, so that the server's own settings follow the same rules.
"""

import os
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from octavo.config import EngineConfig, check_known, flag_of
from octavo.errors import ConfigError
from octavo.plugins.values import base_type, convert

T = TypeVar("T")
_METAVARS = {int: "N", float: "X", str: "TEXT", tuple: "A,B", Mapping: "JSON"}


def add_engine_arguments(parser: ArgumentParser, positional: bool = True) -> None:
    """Add a flag for each field of EngineConfig, `--config FILE`, and MODEL as a positional unless told not to."""
    if positional:
        parser.add_argument("model_positional", metavar="MODEL", nargs="?", default=SUPPRESS, help="same as --model")
    parser.add_argument("--config", dest="config_file", metavar="FILE", help="YAML file of flags; flags win")
    add_arguments(parser.add_argument_group("engine"), EngineConfig)


def add_arguments(parser: ArgumentParser | _ArgumentGroup, cls: type) -> None:
    """Add a flag for each field of a dataclass of `documented` fields; the namespace gets only those given."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        _add_flag(parser, item, base_type(hints[item.name])[0])


def _add_flag(parser: ArgumentParser | _ArgumentGroup, item: Field[Any], base: Any) -> None:
    short = item.metadata["short"]
    names = [flag_of(item.name), *([short] if short else [])]
    text = _help(item).replace("%", "%%")
    if base is bool:
        parser.add_argument(*names, dest=item.name, action=BooleanOptionalAction, default=SUPPRESS, help=text)
        return
    action = "append" if base is tuple else "store"
    nargs = "+" if item.metadata.get("several") else None
    metavar = "SIZE" if item.metadata.get("size") else _METAVARS[base]
    parser.add_argument(
        *names, dest=item.name, action=action, nargs=nargs, default=SUPPRESS, metavar=metavar, help=text
    )


def _help(item: Field[Any]) -> str:
    variable = item.metadata.get("env")
    notes = [f"default: {_shown(item.default)}"] if _shown(item.default) else []
    notes += [f"environment: {variable}"] if variable else []
    return str(item.metadata["help"]) + (f" ({'; '.join(notes)})" if notes else "")


def _shown(default: object) -> str:
    if default is None or default == () or default == "":
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def engine_config(args: Namespace, others: Sequence[type] = ()) -> EngineConfig:
    """The engine's configuration from parsed arguments; the YAML file may hold keys of `others` too.

    Raises ConfigError for an unknown key, a bad value, or MODEL given twice.
    """
    positional = getattr(args, "model_positional", None)
    if positional is not None:
        flag = getattr(args, "model", positional)
        if flag != positional:
            raise ConfigError(f"The model is given twice, as {positional!r} and as --model {flag!r}: leave one out.")
        args = Namespace(**{**vars(args), "model": positional})
    return resolve(EngineConfig, args, others)


def resolve(cls: type[T], args: Namespace, others: Sequence[type] = ()) -> T:
    """A `cls` from flags, then the environment, then `--config`, then defaults; YAML keys of `others` are skipped."""
    hints = get_type_hints(cls)
    path = getattr(args, "config_file", None)
    file_values = read_config_file(Path(path), (cls, *others)) if path else {}
    values = {}
    for item in fields(cls):  # type: ignore[arg-type]
        found = _find(item, args, file_values, path)
        if found is not None:
            value, source = found
            values[item.name] = convert(value, hints[item.name], source, item.metadata.get("size", False))
    return cls(**values)


def _find(
    item: Field[Any], args: Namespace, file_values: dict[str, Any], path: str | None
) -> tuple[object, str] | None:
    if hasattr(args, item.name):
        value = getattr(args, item.name)
        if item.metadata.get("several"):
            value = [one for group in value for one in group]
        return value, flag_of(item.name)
    from_environment = environment_value(item)
    if from_environment is not None:
        return from_environment, f"The environment variable {item.metadata['env']}"
    if file_values.get(item.name) is not None:
        return file_values[item.name], f"{item.name} in {path}"
    return None


def environment_value(item: Field[Any]) -> str | None:
    """What the environment says of a field; an empty variable counts as unset."""
    variable = item.metadata.get("env")
    return os.environ.get(variable) or None if variable else None


def environment_plugins() -> tuple[str, ...] | None:
    """The plugins that the environment names, None where it names none."""
    (item,) = (item for item in fields(EngineConfig) if item.name == "plugins")
    text = environment_value(item)
    return None if text is None else convert(text, tuple[str, ...], str(item.metadata["env"]))


def read_config_file(path: Path, classes: Sequence[type]) -> dict[str, Any]:
    """The YAML file's values by field name (`-` and `_` alike). Raises ConfigError for a key of none of `classes`."""
    known = {item.name for cls in classes for item in fields(cls)}
    values: dict[str, Any] = {}
    for key, value in _parse_yaml(path).items():
        name = str(key).replace("-", "_")
        check_known(name, known, f"a setting ({path})")
        if name in values:
            raise ConfigError(f"{path} sets {name} twice: leave one out.")
        values[name] = value
    return values


def _parse_yaml(path: Path) -> dict[object, Any]:
    import yaml  # only here, so that the offline engine runs without it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {' '.join(str(error).split())}.") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(
            f"The configuration file {path} must hold `name: value` lines, not a {type(content).__name__}."
        )
    return content or {}
