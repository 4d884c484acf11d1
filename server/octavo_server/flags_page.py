"""docs/flags.md, written from the flags themselves: `python -m octavo_server.flags_page > docs/flags.md`."""

import sys
from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

from octavo.config import EngineConfig, flag_of

from octavo_server.api_settings import ApiSettings
from octavo_server.flags import ENVIRONMENT, FOREIGN, ForeignFlag
from octavo_server.settings import ServerSettings

_HEAD = """# Flags

A YAML file given with `--config FILE` takes the same names as keys. A flag wins over the environment, that over the
file, and that over the default. `-` and `_` are alike in flags and keys. An unknown name is an error that says the
nearest one.

Lists are separated by commas, or the flag is repeated: `--attention-backend triton:splits=8,mode=fast,torch` names
`triton` with two options, then `torch`. Sizes take a suffix: `32k` is 32,000 and `32K` is 32,768 (k m g t are decimal,
K M G T binary). MODEL may stand alone or follow `--model`.
"""
_TABLE = ("| Flag | Default | Meaning |", "|---|---|---|")
_FOREIGN = """## Flags of vLLM

Launch scripts written for vLLM may hold flags that Octavo does not have. None passes silently: a flag in this table is
accepted at the values named here and is an error otherwise, and "any, with a warning" means what it says.

| Flag | Accepted | Remark |
|---|---|---|"""
_ENVIRONMENT = """## Environment variables of vLLM

`VLLM_ATTENTION_BACKEND` is taken as `--attention-backend`, with a warning; `VLLM_API_KEY` as `--api-key`. These are not
read, and a warning says so:
"""


def page() -> str:
    """The page's text."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    yield "## Engine\n\nEvery command that starts an engine takes these; `LLM(...)` takes them as keyword arguments"
    yield "(`max_model_len=4096`).\n"
    yield from (*_TABLE, *map(_row, fields(EngineConfig)))
    yield "\n## Server\n\nThese and the following belong to `octavo serve`.\n"
    yield from (*_TABLE, *map(_row, fields(ServerSettings)))
    yield "\n## API\n"
    yield from (*_TABLE, *map(_row, fields(ApiSettings)))
    yield f"\n{_FOREIGN}"
    yield from map(_foreign_row, FOREIGN)
    yield f"\n{_ENVIRONMENT}"
    yield from (f"- `{name}`: {hint}." for name, hint in ENVIRONMENT.items())


def _row(item: Field[Any]) -> str:
    names = [flag_of(item.name)]
    names += [flag_of(f"no_{item.name}")] if isinstance(item.default, bool) else []
    names += [item.metadata["short"]] if item.metadata["short"] else []
    variable = item.metadata.get("env")
    meaning = item.metadata["help"] + (f" (environment: `{variable}`)" if variable else "")
    return f"| {', '.join(f'`{name}`' for name in names)} | {_default(item.default)} | {meaning} |"


def _default(value: object) -> str:
    if value is None or value == () or value == "":
        return ""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _foreign_row(flag: ForeignFlag) -> str:
    names = [flag_of(flag.name), *([flag.short] if flag.short else [])]
    if flag.ignored:
        accepted = "any, with a warning"
    elif flag.nargs == 0:
        accepted = f"`{flag_of(f'no_{flag.name}')}`"
    else:
        accepted = ", ".join(f"`{value}`" if value else "nothing" for value in flag.neutral)
    return f"| {', '.join(f'`{name}`' for name in names)} | {accepted} | {flag.remark} |"


if __name__ == "__main__":
    sys.stdout.write(page())
