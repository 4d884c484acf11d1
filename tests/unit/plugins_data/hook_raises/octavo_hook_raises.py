"""A plugin whose hook raises."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_matmuls() -> list[Provider]:
    raise LookupError("no tuned table")
