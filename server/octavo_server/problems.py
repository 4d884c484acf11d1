"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from octavo.errors import EngineDeadError, OctavoError, RequestError
from starlette.exceptions import HTTPException

_RETRY_SECONDS = 1


class NotReadyError(OctavoError):
    """The engine is still starting."""


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""


def problem(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    return {"error": {"message": _sendable(message), "type": kind, "param": _sendable(param), "code": code}}


def _sendable(text: Any) -> Any:
    """The text without half surrogates, which a client's own words may hold and no answer can."""
    return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


def describe(error: OctavoError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for an error of ours."""
    match error:
        case UnknownModelError():
            return 404, problem(str(error), "invalid_request_error", "model", "model_not_found")
        case RequestError():
            return 400, problem(str(error), "invalid_request_error", error.field)
        case NotReadyError():
            return 503, problem(str(error), "service_unavailable", code="engine_starting")
        case EngineDeadError():
            return 503, problem(str(error), "service_unavailable", code="engine_dead")
        case _:
            return 500, problem(str(error), "server_error")


def install(app: FastAPI) -> None:
    """Make every error answer of the app have OpenAI's shape."""
    app.add_exception_handler(OctavoError, _on_octavo_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


async def _on_octavo_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OctavoError)
    status, body = describe(error)
    headers = {"Retry-After": str(_RETRY_SECONDS)} if status == 503 else None
    return JSONResponse(body, status, headers)


async def _on_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param = _sentence(error.errors()[0])
    return JSONResponse(problem(message, "invalid_request_error", param), 400)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is no {request.url.path} here; the API is under /v1."
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}."
    return JSONResponse(problem(message, "invalid_request_error"), error.status_code, error.headers)


async def _on_bug(_: Request, error: Exception) -> JSONResponse:
    message = f"The server failed with {type(error).__name__}; its log has the details."
    return JSONResponse(problem(message, "server_error"), 500)


def _sentence(detail: dict[str, Any]) -> tuple[str, str | None]:
    """A validation error as a sentence, and the field that it is about."""
    place = [str(part) for part in detail["loc"] if part != "body"]
    if detail["type"] == "json_invalid":
        return f"The body is not valid JSON: {detail.get('ctx', {}).get('error', detail['msg'])}.", None
    if not place:
        return (
            f"The body must be a JSON object, with the header Content-Type: application/json ({detail['msg']}).",
            None,
        )
    # Which member of a union was tried is part of pydantic's path, but says nothing to a client.
    path, message = ".".join(part for part in place if part.isalnum() or part.isidentifier()), detail["msg"].rstrip(".")
    if detail["type"] == "missing":
        return f"The field {path!r} is missing.", place[0]
    return f"{path}: {message}; found {_short(detail.get('input'))}.", place[0]


def _short(value: Any, limit: int = 80) -> str:
    text = ascii(value[:limit] if isinstance(value, str | list) else value)
    return text if len(text) <= limit else text[:limit] + "..."
