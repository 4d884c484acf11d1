"""The server's plugin: adds `octavo serve`. Imports nothing heavy."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_commands() -> list[Provider]:
    """The commands that the server brings."""
    return [
        Provider(
            name="serve", factory="octavo_server.serve:ServeCommand", summary="serve a model over OpenAI's HTTP API"
        )
    ]
