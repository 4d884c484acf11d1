"""What authors of providers test with: oracles, random inputs, tolerances, and the conformance kit.

class TestMyAttention(AttentionConformance):
    backend = MyBackend
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.testing.attention_conformance import AttentionConformance
    from octavo.testing.ops_conformance import FusedOpsConformance

__all__ = ["AttentionConformance", "FusedOpsConformance"]

_MODULES = {"AttentionConformance": "attention_conformance", "FusedOpsConformance": "ops_conformance"}


def __getattr__(name: str) -> type:
    """The kit's classes, imported when they are asked for: they need pytest, and the oracles do not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: type = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found
