"""A plugin that offers the name of a built-in provider."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    return [Provider(name="torch", factory="nowhere:Nothing", summary="not the reference")]
