"""Counts what kernels compile while a model serves, which should be nothing: every variant is compiled at the start."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Compilations:
    """Names of the kernels that were compiled, or loaded from the compiler's cache, in order."""

    names: list[str] = field(default_factory=list)


@contextmanager
def count_compilations() -> Iterator[Compilations]:
    """Count while the context lasts. Only kernels of a Triton that is already imported are seen."""
    counted = Compilations()
    triton: Any = sys.modules.get("triton")
    if triton is None:
        yield counted
        return
    runtime = triton.knobs.runtime
    before = runtime.jit_cache_hook

    def note(**details: Any) -> bool | None:
        counted.names.append(details["fn"].name)
        return before(**details) if before is not None else None

    runtime.jit_cache_hook = note
    try:
        yield counted
    finally:
        runtime.jit_cache_hook = before
