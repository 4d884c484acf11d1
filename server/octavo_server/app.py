"""The HTTP routes: OpenAI's completions and chat, models, tokens, and what tells of the server itself."""

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence

from fastapi import FastAPI, Request, Response
from octavo import __version__
from octavo.async_engine import AsyncEngine
from octavo.errors import OctavoError

from octavo_server import problems, tokens
from octavo_server.api_settings import ApiSettings, read_chat_template
from octavo_server.backends import describe_backends
from octavo_server.bodies import BodyRoute
from octavo_server.fields import UnknownFieldsWarned
from octavo_server.forms import ChatForm, CompletionForm, Form
from octavo_server.jobs import Api, Caller, Job, chat_job, check_reason, completion_job
from octavo_server.metrics import Metrics
from octavo_server.problems import NotReadyError, UnknownModelError
from octavo_server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from octavo_server.responses import JSON, envelope, usage
from octavo_server.security import key_of
from octavo_server.streaming import DONE, EventStream, JSONAnswer, event, while_connected

_CLIENT_LEFT = 499  # seen by nobody but an access log


def create_app(
    engine: AsyncEngine,
    served_names: Sequence[str] = (),
    *,
    created: int = 0,
    settings: ApiSettings | None = None,
    isolate_cache_by_key: bool = False,
) -> FastAPI:
    """The server's ASGI application over an engine, which may still be starting.

    `served_names` are the model's names (default: the engine's own); `created` is the model's date in /v1/models.
    `isolate_cache_by_key`: a prefix-cache entry serves requests of the same API key only.
    Raises ConfigError for a chat template that cannot be read.
    """
    settings = settings or ApiSettings()
    api = Api(engine, settings, read_chat_template(settings), isolate_cache_by_key)
    app = FastAPI(title="Octavo", version=__version__)
    app.router.route_class = BodyRoute
    problems.install(app)
    if settings.unknown_fields == "warn":
        app.add_middleware(UnknownFieldsWarned)

    def names() -> list[str]:
        return list(served_names) or [engine.info.model]

    _add_status_routes(app, engine)
    _add_facts_routes(app, engine, Metrics(engine, lambda: names()[0]), settings)
    _add_token_routes(app, api, names)
    _add_generation_routes(app, api, names)

    @app.get("/v1/models")
    async def models() -> JSONAnswer:
        """The model, under each of its names."""
        _check_ready(engine)
        return JSONAnswer({"object": "list", "data": [_card(engine, name, names()[0], created) for name in names()]})

    return app


def _add_generation_routes(app: FastAPI, api: Api, names: Callable[[], list[str]]) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete a text or token ids."""
        model = _model(api.engine, body.model, names)
        job = await completion_job(api, body, model, _caller(body, request))
        return await _answer(request, body, job, CompletionForm(job, body))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        model = _model(api.engine, body.model, names)
        job = await chat_job(api, body, model, _caller(body, request))
        return await _answer(request, body, job, ChatForm(job, body))


def _add_token_routes(app: FastAPI, api: Api, names: Callable[[], list[str]]) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> JSONAnswer:
        """Token ids of a text or of a conversation."""
        _model(api.engine, body.model, names)
        return JSONAnswer(await tokens.tokenize(api, body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> JSONAnswer:
        """The text of token ids."""
        _model(api.engine, body.model, names)
        return JSONAnswer(await tokens.detokenize(api, body))


def _add_facts_routes(app: FastAPI, engine: AsyncEngine, metrics: Metrics, settings: ApiSettings) -> None:
    if not settings.disable_log_stats:
        engine.observer = metrics

    @app.get("/v1/backends")
    async def backends() -> JSONAnswer:
        """Which provider serves what, and why not the others."""
        _check_ready(engine)
        return JSONAnswer(describe_backends(engine.info))

    @app.get("/metrics")
    async def show_metrics(request: Request) -> Response:
        """Counters, gauges and histograms for Prometheus."""
        content, media_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, media_type=media_type)


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


def _model(engine: AsyncEngine, asked: str | None, names: Callable[[], list[str]]) -> str:
    _check_ready(engine)
    known = names()
    if asked is None:
        return known[0]
    if asked not in known:
        served = ", ".join(map(repr, known))
        raise UnknownModelError(f"The model {asked!r} is not served here; this server has {served}.", "model")
    return asked


def _caller(body: GenerationRequest, request: Request) -> Caller:
    return Caller(body.request_id or request.headers.get("x-request-id"), key_of(request.scope))


async def _answer(request: Request, body: GenerationRequest, job: Job, form: Form) -> Response:
    if body.stream:
        return EventStream(_events(body, job, form))
    outputs = await while_connected(request, job.run())
    return Response(status_code=_CLIENT_LEFT) if outputs is None else JSONAnswer(form.whole(outputs))


async def _events(body: GenerationRequest, job: Job, form: Form) -> AsyncGenerator[bytes, None]:
    """The events of a stream. An error after the start is an event too: the status is already sent."""
    options = body.stream_options
    tell = job.api.settings.enable_force_include_usage or (options is not None and options.include_usage)
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
                for chunk in form.chunks(prompt, delta, **more):
                    yield event(chunk)
        if tell:
            counts = usage(job.num_prompt_tokens, num_completion, num_cached)
            yield event(envelope(job, form.chunk_kind, [], usage=counts))
    except OctavoError as error:
        yield event(problems.describe(error)[1])
    yield DONE
