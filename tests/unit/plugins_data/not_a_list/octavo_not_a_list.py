"""A plugin whose hook returns a tuple."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_matmuls() -> tuple[Provider, ...]:
    return (Provider(name="tupled", factory="nowhere:Nothing", summary="in a tuple"),)
