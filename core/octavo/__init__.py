"""Octavo: LLM inference in which every kernel is a plugin.

The names below are imported on first use, so that `import octavo` (which every plugin module does) loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.llm import LLM
    from octavo.outputs import CompletionOutput, Logprob, RequestOutput
    from octavo.plugins.records import Provider, hookimpl
    from octavo.sampling_params import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "octavo.llm",
    "SamplingParams": "octavo.sampling_params",
    "EngineConfig": "octavo.config",
    "RequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
    "Logprob": "octavo.outputs",
    "Provider": "octavo.plugins.records",
    "hookimpl": "octavo.plugins.records",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "Provider",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
