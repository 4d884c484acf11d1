"""The server's plugin: adds `octavo serve` and `octavo chat`. Imports nothing heavy."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_commands() -> list[Provider]:
    """The commands that the server brings."""
    return [
        Provider(
            name="serve", factory="octavo_server.serve:ServeCommand", summary="serve a model over OpenAI's HTTP API"
        ),
        Provider(
            name="chat", factory="octavo_server.chat:ChatCommand", summary="talk to a served model in the terminal"
        ),
    ]
