"""A plugin that forgot the marker."""


def octavo_matmuls() -> list[object]:
    """Offer nothing that anyone sees."""
    return []
