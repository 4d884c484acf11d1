"""A plugin whose hooks raise after start-up, and whose backends fail in every other way."""

from typing import Any

from octavo import Provider, hookimpl


class Moody:
    """Raises when asked whether it can serve."""

    @staticmethod
    def why_not(spec: Any, options: Any) -> str | None:
        """Never answers."""
        raise ZeroDivisionError("split by zero heads")


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    return [
        Provider(name="moody", factory=Moody, summary="raises when asked"),
        Provider(name="absent", factory="octavo_bad_engine_hook:Missing", summary="is not there"),
    ]


@hookimpl(tryfirst=True)
def octavo_choose(kind: str, spec: Any) -> str | None:
    if getattr(spec, "explode", False):
        raise ArithmeticError("no choice adds up")
    return None


@hookimpl(tryfirst=True)
def octavo_engine_started(engine: Any) -> None:
    raise OSError("no dashboard to tell")
