"""A plugin written for an interface that is not there yet."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    return [Provider(name="futuristic", factory="nowhere:Nothing", summary="of another time", api=7)]
