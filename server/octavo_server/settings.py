"""The server's own flags: they follow the same rules as the engine's."""

from dataclasses import dataclass

from octavo.config import documented
from octavo.errors import ConfigError

_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where and how the server listens. Raises ConfigError for a value out of range."""

    host: str = documented("address to listen on; 0.0.0.0 opens the server to the network", "127.0.0.1")
    port: int = documented("port to listen on; 0: a free one", 8000)
    served_model_name: tuple[str, ...] = documented("names that requests may call the model by; the first is shown", ())
    shutdown_timeout: float = documented("seconds that running requests get to end after SIGTERM", 30.0)
    uvicorn_log_level: str = documented(f"what the HTTP layer logs: {', '.join(_LOG_LEVELS)}", "warning")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}, but must be from 0 to 65535.")
        if not 0 <= self.shutdown_timeout < float("inf"):
            raise ConfigError(f"--shutdown-timeout is {self.shutdown_timeout}, but must be a number of seconds from 0.")
        if self.uvicorn_log_level not in _LOG_LEVELS:
            known = ", ".join(_LOG_LEVELS)
            raise ConfigError(f"--uvicorn-log-level is {self.uvicorn_log_level!r}, but must be one of {known}.")
