"""What a plugin says of itself: Provider records, the marker for its hook functions, and a command's interface."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pluggy

PROJECT = "octavo"
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A plugin's named offer.

    `factory` is a class, or "package.module:Class" imported only when the provider is considered. `priority` orders
    automatic choice, highest first; one that is not `automatic` serves only where the configuration names it. `api` is
    the interface version that the factory was written for. `options` is a dataclass type, filled from flags such as
    `--attention-backend triton:splits=8` and handed to the factory and its `why_not`.
    """

    name: str
    factory: str | Callable[..., Any]
    summary: str
    priority: int = 0
    api: int = 1
    options: type | None = None
    automatic: bool = True


class Command(Protocol):
    """A subcommand of `octavo`. Built as `Command()`, only when it is the one asked for."""

    help: str
    """What the command does, shown above its flags."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, args: Namespace) -> int:
        """Do it; returns the exit code. OctavoErrors are printed by the caller."""
