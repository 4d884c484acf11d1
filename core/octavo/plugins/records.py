"""What a plugin says of itself: Provider records, and the marker for its hook functions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pluggy

PROJECT = "octavo"
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A plugin's named offer.

    `factory` is a class, or "package.module:Class" imported only when the provider is chosen. `priority` orders automatic
    choice, highest first. `api` is the interface version that the factory was written for. `options` is a dataclass type,
    filled from flags such as `--attention-backend triton:splits=8` and handed to the factory and its `why_not`.
    """

    name: str
    factory: str | Callable[..., Any]
    summary: str
    priority: int = 0
    api: int = 1
    options: type | None = None
