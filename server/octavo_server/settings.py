"""The server's own flags: they follow the same rules as the engine's."""

import json
import ssl
from dataclasses import dataclass
from math import isfinite

from octavo.config import documented, flag_of
from octavo.errors import ConfigError

_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the server listens, whom it lets in, and how it ends. Raises ConfigError for a value out of range."""

    host: str = documented("address to listen on; 0.0.0.0 opens the server to the network", "127.0.0.1")
    port: int = documented("port to listen on; 0: a free one", 8000)
    uds: str | None = documented("path of a Unix socket to listen on, in place of an address and port")
    root_path: str = documented("path under which a proxy shows the server, such as /llm", "")
    served_model_name: tuple[str, ...] = documented(
        "names that requests may call the model by; the first is shown", (), several=True
    )

    api_key: tuple[str, ...] | None = documented(
        "keys, one of which each request must bear; other users of the machine see flags, so that a file is safer",
        env="OCTAVO_API_KEY",
        several=True,
    )
    api_key_file: str | None = documented("file of keys, one a line; # begins a comment")
    isolate_cache_by_key: bool = documented(
        "share prefix-cache entries between requests of the same key only; needs keys", False
    )
    open_routes: tuple[str, ...] = documented("routes that need no key, besides /live and /health", ())
    ssl_keyfile: str | None = documented("file of the TLS certificate's private key (PEM)")
    ssl_certfile: str | None = documented("file of the TLS certificate (PEM); with it the server speaks https only")
    ssl_ca_certs: str | None = documented("file of the authorities whose client certificates are accepted (PEM)")
    ssl_cert_reqs: int = documented("client certificates: 0 not asked for, 1 checked if there is one, 2 required", 0)
    ssl_ciphers: str | None = documented("TLS ciphers, as OpenSSL writes them; default: Python's")
    enable_ssl_refresh: bool = documented("load the certificate again when its files change", False)
    allowed_origins: tuple[str, ...] = documented("origins whose pages may call the server (CORS); default: none", ())
    allowed_methods: tuple[str, ...] = documented("methods that such pages may use", ("*",))
    allowed_headers: tuple[str, ...] = documented("headers that such pages may send", ("*",))
    allow_credentials: bool = documented("let such pages send cookies and the like; needs named origins", False)
    disable_fastapi_docs: bool = documented("serve no /docs, /redoc and /openapi.json", False)

    max_body_bytes: int = documented("largest body of a request", 8 << 20, size=True)
    max_concurrency_per_key: int | None = documented(
        "requests that one key may have open at once; without keys, everybody together"
    )
    max_num_queued_reqs: int | None = documented("requests that may wait for the engine; default: any number")
    max_num_queued_tokens: int | None = documented(
        "prompt tokens that may wait for the engine; default: any number", size=True
    )
    engine_timeout: float = documented(
        "seconds without a step, while requests run, after which the server gives up and ends", 300.0
    )
    shutdown_timeout: float = documented("seconds that running requests get to end after SIGTERM", 30.0)

    uvicorn_log_level: str = documented(f"what the HTTP layer logs: {', '.join(_LOG_LEVELS)}", "warning")
    disable_uvicorn_access_log: bool = documented("log no line for each HTTP request at level info", False)
    disable_access_log_for_endpoints: tuple[str, ...] = documented("routes without such a line", ())
    enable_request_id_headers: bool = documented("answer with X-Request-Id: the client's own, or a new one", False)
    enable_log_requests: bool = documented("log each request with its parameters and prompt", False)
    enable_log_outputs: bool = documented("log what is generated too; needs --enable-log-requests", False)
    max_log_len: int | None = documented("characters of a prompt or output to log; default: all")
    otlp_traces_endpoint: str | None = documented(
        "where OpenTelemetry traces go, such as http://localhost:4318/v1/traces or grpc://localhost:4317"
    )

    def __post_init__(self) -> None:
        for name in _LISTS:  # launch scripts write these as JSON
            object.__setattr__(self, name, _from_json(name, getattr(self, name)))
        self._check_ranges()
        self._check_security()

    @property
    def scheme(self) -> str:
        """http or https."""
        return "https" if self.ssl_certfile else "http"

    def _check_ranges(self) -> None:
        _check_between("port", self.port, 0, 65535)
        for name in ("max_body_bytes", "max_concurrency_per_key"):
            _check_least(name, getattr(self, name), 1)
        for name in ("max_num_queued_reqs", "max_num_queued_tokens", "max_log_len"):
            _check_least(name, getattr(self, name), 0)
        if not (isfinite(self.shutdown_timeout) and self.shutdown_timeout >= 0):
            _refuse("shutdown_timeout", self.shutdown_timeout, "a number of seconds from 0")
        if not (isfinite(self.engine_timeout) and self.engine_timeout > 0):
            _refuse("engine_timeout", self.engine_timeout, "a number of seconds above 0")
        if self.uvicorn_log_level not in _LOG_LEVELS:
            _refuse("uvicorn_log_level", self.uvicorn_log_level, f"one of {', '.join(_LOG_LEVELS)}")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            _refuse("root_path", self.root_path, "a path that begins with / and does not end with it")

    def _check_security(self) -> None:
        if self.api_key is not None and not all([self.api_key, *self.api_key]):
            raise ConfigError("--api-key (or OCTAVO_API_KEY) is given but empty: give a key, or leave it out.")
        if self.api_key_file == "":
            raise ConfigError("--api-key-file is given but empty: name a file, or leave it out.")
        _check_between("ssl_cert_reqs", self.ssl_cert_reqs, int(ssl.CERT_NONE), int(ssl.CERT_REQUIRED))
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh"):
                if getattr(self, name):
                    raise ConfigError(f"{flag_of(name)} needs --ssl-certfile: without a certificate there is no TLS.")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ConfigError(f"--ssl-cert-reqs {self.ssl_cert_reqs} needs --ssl-ca-certs to check certificates with.")
        if self.allow_credentials and ("*" in self.allowed_origins or not self.allowed_origins):
            raise ConfigError("--allow-credentials needs --allowed-origins with named origins, not '*' or none.")
        for name in self.open_routes:
            if not name.startswith("/"):
                raise ConfigError(f"--open-routes holds {name!r}, but a route begins with /.")


def _from_json(name: str, entries: tuple[str, ...]) -> tuple[str, ...]:
    """The entries of `["a", "b"]`, which was split at its comma; other entries as they are."""
    text = ",".join(entries)
    if not text.startswith("["):
        return entries
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        _refuse(name, text, 'a list such as a,b or ["a", "b"]')
    return tuple(found)


def _refuse(name: str, value: object, wanted: str) -> None:
    raise ConfigError(f"{flag_of(name)} is {value!r}, but must be {wanted}.")


def _check_between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        _refuse(name, value, f"from {low} to {high}")


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        _refuse(name, value, f"at least {least}")
