"""The errors that Octavo raises: one small tree, each message a sentence a user can act on."""


class OctavoError(Exception):
    """The root: catch it to catch everything that Octavo raises on purpose."""


class ConfigError(OctavoError):
    """The configuration asks for something unknown, contradictory or impossible here."""


class PluginError(OctavoError):
    """A plugin or provider that the configuration names cannot serve."""


class UnservedError(PluginError):
    """No provider can serve what is asked; the message has each one's reason."""


class CheckpointError(OctavoError):
    """A checkpoint is missing, damaged, unsafe or of an unknown kind."""


class RequestError(OctavoError):
    """A request is refused; `field` names the offending field, None when no single one is."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class StepError(OctavoError):
    """A step failed; the message names the provider, layer and shape where they are known."""


class EngineDeadError(OctavoError):
    """The engine, its process or one of its workers is gone."""
