"""The modules that an FP8 checkpoint leaves dense."""

from collections.abc import Mapping
from typing import Any

from octavo.errors import CheckpointError

LOGITS = "lm_head"
"""Left dense by all that write these formats; a checkpoint that holds it in FP8 is believed."""


def read_skipped(quantization: Mapping[str, Any]) -> frozenset[str]:
    """The names under `ignored_layers` or `modules_to_not_convert`. Raises CheckpointError."""
    for key in ("ignored_layers", "modules_to_not_convert"):
        names = quantization.get(key)
        if not names:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"quantization_config's {key} is {names!r}, but must be a list of module names.")
        return frozenset(names)
    return frozenset()


def is_skipped(module: str, skipped: frozenset[str]) -> bool:
    """Whether the module or one that it lies in is among `skipped`, by its whole name; the logits' always are."""
    parts = module.split(".")
    return module == LOGITS or any(".".join(parts[:end]) in skipped for end in range(1, len(parts) + 1))
