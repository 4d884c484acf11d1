"""A plugin whose hook forgets to return."""

from octavo import hookimpl


@hookimpl
def octavo_matmuls() -> None:
    """Offer nothing."""
