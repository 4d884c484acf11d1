"""Who may call the server: API keys, TLS and the pages of other origins."""

import hashlib
import hmac
import logging
import os
import ssl
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from octavo.errors import ConfigError
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo_server.problems import problem
from octavo_server.settings import ServerSettings

ALWAYS_OPEN = ("/live", "/health")
"""Routes that never need a key: whoever watches over the server asks them."""

DOCS = ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
_VLLM_VARIABLE = "VLLM_API_KEY"
logger = logging.getLogger("octavo.security")


def read_keys(settings: ServerSettings) -> tuple[str, ...]:
    """All keys of the flags, the environment and the file; none where the server is open to all.

    Raises ConfigError for a file that cannot be read or holds no key: no mistake leaves the server open, nor the cache
    shared.
    """
    keys = list(settings.api_key or ())
    if settings.api_key_file is not None:
        keys += _keys_of_file(Path(settings.api_key_file))
    if not keys and (theirs := os.environ.get(_VLLM_VARIABLE)):
        logger.warning("The key is taken from %s; Octavo's own variable is OCTAVO_API_KEY.", _VLLM_VARIABLE)
        keys.append(theirs)
    if not keys and os.environ.get("OCTAVO_API_KEY"):
        raise ConfigError("OCTAVO_API_KEY is set, but holds no key: give it one, or unset it.")
    if settings.isolate_cache_by_key and not keys:
        raise ConfigError(
            "--isolate-cache-by-key needs keys to tell callers apart: give --api-key-file, or leave it out."
        )
    for number, key in enumerate(keys, 1):
        if not (key.isascii() and key.isprintable()) or key != key.strip():
            raise ConfigError(
                f"API key number {number} holds a character that no HTTP header can carry: choose another."
            )
    return tuple(dict.fromkeys(keys))


def _keys_of_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file names {str(path)!r}, which cannot be read: {error}.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file names {str(path)!r}, which holds no key: write one a line.")
    return keys


def route_of(scope: Scope) -> str:
    """The path of a request within the app: without the root path, where a proxy has left it on."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def key_of(scope: Scope) -> str:
    """What stands for the caller's key (not the key itself), empty where none is asked for."""
    return str(scope.get("state", {}).get("octavo_key", ""))


class KeyGuard:
    """Middleware: lets a request pass that bears one of `keys`, or asks for an open route; 401 for the rest."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_routes: Collection[str] = ()) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = frozenset([*ALWAYS_OPEN, *open_routes])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 (ASGI)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        name = self._known(Headers(scope=scope).get("authorization", ""))
        if name is not None:  # an open route learns of the key too: limits and cache entries are each key's own
            scope.setdefault("state", {})["octavo_key"] = name
        if name is not None or (scope["type"] == "http" and route_of(scope) in self._open):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _unauthorized(scope)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _known(self, authorization: str) -> str | None:
        """The key's digest, which is not secret; every key is compared, so that the time tells nothing."""
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip().encode("latin-1", "replace"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex() if scheme.lower() == "bearer" and any(matches) else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, so that the comparison does not tell the key's


def _unauthorized(scope: Scope) -> JSONResponse:
    given = "authorization" in Headers(scope=scope)
    found = "the one given is not known here" if given else "none was given"
    message = f"This server asks for an API key, and {found}. Send the header Authorization: Bearer KEY."
    body = problem(message, "invalid_request_error", code="invalid_api_key")
    return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})


def guard(app: FastAPI, settings: ServerSettings, keys: Sequence[str]) -> None:
    """Ask for one of `keys` on all routes but the open ones; no keys, no questions."""
    if settings.disable_fastapi_docs:
        app.router.routes = [route for route in app.router.routes if getattr(route, "path", "") not in DOCS]
    if keys:
        app.add_middleware(KeyGuard, keys=keys, open_routes=settings.open_routes)


def allow_origins(app: FastAPI, settings: ServerSettings) -> None:
    """Let pages of the named origins call the app; without names, none but its own."""
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=("X-Request-Id", "Retry-After"),
        )


def tls_options(settings: ServerSettings) -> dict[str, Any]:
    """uvicorn's arguments for TLS, none where it is not asked for. Raises ConfigError for files that do not serve."""
    if settings.ssl_certfile is None:
        return {}
    options: dict[str, Any] = {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_cert_reqs": settings.ssl_cert_reqs,
        "ssl_ca_certs": settings.ssl_ca_certs,
    }
    if settings.ssl_ciphers:
        options["ssl_ciphers"] = settings.ssl_ciphers
    _try_tls(settings)
    return options


def _try_tls(settings: ServerSettings) -> None:
    assert settings.ssl_certfile is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password keeps OpenSSL from asking for one at the terminal.
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password="none")
        if settings.ssl_ca_certs is not None:
            context.load_verify_locations(settings.ssl_ca_certs)
        if settings.ssl_ciphers is not None:
            context.set_ciphers(settings.ssl_ciphers)
    except OSError as error:  # SSLError is one
        files = f"{settings.ssl_certfile}, {settings.ssl_keyfile or 'no --ssl-keyfile'}"
        raise ConfigError(f"The TLS flags do not serve ({files}): {error.strerror or error}.") from error


def certificate_times(settings: ServerSettings) -> tuple[int, ...]:
    """When the certificate's files were last written (ns); 0 for one that is not there."""
    files = [Path(name) for name in (settings.ssl_certfile, settings.ssl_keyfile) if name]
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)
