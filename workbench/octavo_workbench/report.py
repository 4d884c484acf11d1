"""Results as a table for a reader and as JSON for a program, with what is needed to read them later."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError

_PACKAGES = ("octavo", "torch", "transformers")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Right-aligned columns under a header; floats get a digit or two behind the point."""
    lines = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def environment() -> dict[str, Any]:
    """The machine and the versions that a result was measured with."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None


def check_writable(path: str | None) -> None:
    """Raise ConfigError, before minutes are spent on the result, if it could not be written to `path`."""
    if path is not None and not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"--json names {path}, but there is no directory {Path(path).resolve().parent}.")


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    """Write a result and its environment to `path`, if there is one."""
    if path is not None:
        text = json.dumps({**result, "environment": environment()}, indent=2)
        Path(path).write_text(text + "\n", encoding="utf-8")


def verdict(failures: Sequence[str]) -> int:
    """Print what missed its mark; the exit code, 1 if anything did."""
    for failure in failures:
        print(f"missed: {failure}")
    return 1 if failures else 0
