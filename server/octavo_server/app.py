"""The HTTP routes: OpenAI's completions and chat, models, health and version."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from octavo import __version__
from octavo.async_engine import AsyncEngine
from octavo.errors import OctavoError

from octavo_server import problems
from octavo_server.forms import ChatForm, CompletionForm, Form
from octavo_server.jobs import Job, chat_job, check_reason, completion_job
from octavo_server.problems import NotReadyError, UnknownModelError
from octavo_server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from octavo_server.responses import JSON, envelope, usage
from octavo_server.streaming import DONE, EventStream, JSONAnswer, event, while_connected

_CLIENT_LEFT = 499  # seen by nobody but an access log


def create_app(engine: AsyncEngine, served_names: Sequence[str] = (), *, created: int = 0) -> FastAPI:
    """The server's ASGI application over an engine, which may still be starting.

    `served_names` are the model's names (default: the engine's own); `created` is the model's date in /v1/models.
    """
    app = FastAPI(title="Octavo", version=__version__)
    problems.install(app)
    _add_status_routes(app, engine)

    def names() -> list[str]:
        return list(served_names) or [engine.info.model]

    @app.get("/v1/models")
    async def models() -> JSONAnswer:
        """The model, under each of its names."""
        _check_ready(engine)
        return JSONAnswer({"object": "list", "data": [_card(engine, name, names()[0], created) for name in names()]})

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete a text or token ids."""
        model = _model(engine, body, names)
        job = await completion_job(engine, body, model, _request_id(body, request))
        return await _answer(request, body, job, CompletionForm(job, body))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        model = _model(engine, body, names)
        job = await chat_job(engine, body, model, _request_id(body, request))
        return await _answer(request, body, job, ChatForm(job, body))

    return app


def _add_status_routes(app: FastAPI, engine: AsyncEngine) -> None:
    @app.get("/live")
    async def live() -> JSONAnswer:
        """200 as long as the server answers at all."""
        return JSONAnswer({"status": "live"})

    @app.get("/health")
    async def health() -> JSONAnswer:
        """200 once requests are taken; before, and when the engine is gone, 503 with the phase or the reason."""
        if engine.ready:
            return JSONAnswer({"status": "ready"})
        status = "starting" if engine.dead is None else "dead"
        return JSONAnswer({"status": status, "phase": engine.phase}, 503)

    @app.get("/version")
    async def version() -> JSONAnswer:
        """Octavo's version."""
        return JSONAnswer({"version": __version__})


def _card(engine: AsyncEngine, name: str, root: str, created: int) -> JSON:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "octavo",
        "root": root,
        "parent": None,
        "max_model_len": engine.info.max_model_len,
    }


def _check_ready(engine: AsyncEngine) -> None:
    if engine.dead is not None:
        raise engine.dead
    if not engine.ready:
        raise NotReadyError(f"The engine is not ready yet: {engine.phase}. Try again in a moment.")


def _model(engine: AsyncEngine, body: GenerationRequest, names: Any) -> str:
    _check_ready(engine)
    known: list[str] = names()
    if body.model is None:
        return known[0]
    if body.model not in known:
        served = ", ".join(map(repr, known))
        raise UnknownModelError(f"The model {body.model!r} is not served here; this server has {served}.", "model")
    return body.model


def _request_id(body: GenerationRequest, request: Request) -> str | None:
    return body.request_id or request.headers.get("x-request-id")


async def _answer(request: Request, body: GenerationRequest, job: Job, form: Form) -> Response:
    if body.stream:
        return EventStream(_events(body, job, form))
    outputs = await while_connected(request, job.run())
    return Response(status_code=_CLIENT_LEFT) if outputs is None else JSONAnswer(form.whole(outputs))


async def _events(body: GenerationRequest, job: Job, form: Form) -> AsyncGenerator[bytes, None]:
    """The events of a stream. An error after the start is an event too: the status is already sent."""
    options = body.stream_options
    tell = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    num_completion = num_cached = 0
    try:
        async with contextlib.aclosing(job.stream()) as parts:
            async for prompt, delta in parts:
                check_reason(delta.finish_reason, delta.error)
                num_completion += len(delta.token_ids)
                num_cached += delta.num_cached_tokens or 0
                counts = usage(job.num_prompt_tokens, num_completion, num_cached) if always else None
                more = {"usage": counts} if tell or always else {}
                for choice in form.pieces(prompt, delta, delta.prompt_logprobs):
                    yield event(envelope(job, form.chunk_kind, [choice], **more))
        if tell:
            counts = usage(job.num_prompt_tokens, num_completion, num_cached)
            yield event(envelope(job, form.chunk_kind, [], usage=counts))
    except OctavoError as error:
        yield event(problems.describe(error)[1])
    yield DONE
