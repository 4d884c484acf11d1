"""One of two plugins that offer one name."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    return [Provider(name="twin", factory="octavo_twin_a:Twin", summary="twin a")]


class Twin:
    """Serves anything."""
