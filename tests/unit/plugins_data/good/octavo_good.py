"""A plugin that implements every hook."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from octavo import Provider, hookimpl


@dataclass(frozen=True)
class QuickOptions:
    """Options of every type that flags can give."""

    splits: int = 4
    ratio: float = 0.5
    fast: bool = False
    mode: str = "plain"
    limit: int | None = None


def _offer(kind: str, **more: Any) -> list[Provider]:
    return [Provider(name=f"good_{kind}", factory="octavo_good_backend:Quick", summary=f"a good {kind}", **more)]


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    return _offer("attention", options=QuickOptions, priority=99)


@hookimpl
def octavo_kv_cache_formats() -> list[Provider]:
    return _offer("kv_cache")


@hookimpl
def octavo_weight_formats() -> list[Provider]:
    return _offer("weights")


@hookimpl
def octavo_matmuls() -> list[Provider]:
    return _offer("matmul")


@hookimpl
def octavo_fused_ops() -> list[Provider]:
    return _offer("ops")


@hookimpl
def octavo_communicators() -> list[Provider]:
    return _offer("communicator")


@hookimpl
def octavo_executors() -> list[Provider]:
    return _offer("executor")


@hookimpl
def octavo_models() -> list[Provider]:
    return _offer("model")


@hookimpl
def octavo_checkpoint_readers() -> list[Provider]:
    return _offer("checkpoint_reader")


@hookimpl
def octavo_logits_processors() -> list[Provider]:
    return _offer("logits_processor")


@hookimpl
def octavo_commands() -> list[Provider]:
    return [Provider(name="good_command", factory="octavo_good_backend:GreetCommand", summary="greet someone")]


@hookimpl
def octavo_choose(kind: str, spec: Any, candidates: Sequence[Any]) -> str | None:
    wish: str | None = getattr(spec, "wish", None)
    return wish


@hookimpl
def octavo_engine_started(engine: Any) -> None:
    engine.append("started")


@hookimpl
def octavo_engine_stopped(engine: Any) -> None:
    engine.append("stopped")
