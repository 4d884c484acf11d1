"""The hooks that a plugin may implement.

Hooks run at start-up only. Those that return providers are called on each plugin by itself, so that a plugin that fails
takes no other one with it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import pluggy
from octavo.plugins.records import PROJECT, Provider
from octavo.plugins.registry import LoadedProvider

hookspec = pluggy.HookspecMarker(PROJECT)


class HookSpecs(Protocol):
    """Every hook with its exact arguments. An implementation is a module function and may leave arguments out."""

    @hookspec
    def octavo_attention_backends(self) -> list[Provider]:
        """Offer attention backends (`octavo.attention.interface`)."""

    @hookspec
    def octavo_kv_cache_formats(self) -> list[Provider]:
        """Offer KV-cache formats (`octavo.kv_cache.interface`)."""

    @hookspec
    def octavo_weight_formats(self) -> list[Provider]:
        """Offer weight formats: ways in which a checkpoint stores a linear layer (`octavo.weights.interface`)."""

    @hookspec
    def octavo_matmuls(self) -> list[Provider]:
        """Offer matmuls: kernels for canonical weights (`octavo.weights.interface`)."""

    @hookspec
    def octavo_fused_ops(self) -> list[Provider]:
        """Offer fused operators (`octavo.ops.interface`)."""

    @hookspec
    def octavo_communicators(self) -> list[Provider]:
        """Offer tensor-parallel communicators (`octavo.distributed.interface`)."""

    @hookspec
    def octavo_executors(self) -> list[Provider]:
        """Offer executors: where and in which processes the runner runs (`octavo.runtime.executor`)."""

    @hookspec
    def octavo_models(self) -> list[Provider]:
        """Offer models; a provider's name is the architecture as config.json spells it."""

    @hookspec
    def octavo_checkpoint_readers(self) -> list[Provider]:
        """Offer checkpoint readers (`octavo.checkpoints.interface`)."""

    @hookspec
    def octavo_logits_processors(self) -> list[Provider]:
        """Offer logits processors, which change a row's logits before a token is sampled."""

    @hookspec
    def octavo_commands(self) -> list[Provider]:
        """Offer subcommands of `octavo` (`octavo.plugins.records.Command`); the summary is the line in `--help`."""

    @hookspec(firstresult=True)
    def octavo_choose(self, kind: str, spec: Any, candidates: Sequence[LoadedProvider]) -> str | None:
        """Choose among the candidates that can serve `spec`, in order of preference; None leaves it to others.

        Returns a candidate's name. The first plugin to answer wins; the core's own answer comes last: the first one.
        """

    @hookspec
    def octavo_engine_started(self, engine: Any) -> None:
        """Hear that an engine is ready to serve."""

    @hookspec
    def octavo_engine_stopped(self, engine: Any) -> None:
        """Hear that an engine has stopped."""
