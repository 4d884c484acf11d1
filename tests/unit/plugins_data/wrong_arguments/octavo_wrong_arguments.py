"""A plugin whose hook takes an argument that the hook does not have."""

from octavo import hookimpl


@hookimpl
def octavo_engine_started(engine: object, clock: object) -> None:
    """Hear of the start."""
