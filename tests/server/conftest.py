"""A server in the test's own event loop, over an engine without a model."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.text.tokenizer import Tokenizer
from octavo_server.api_settings import ApiSettings
from octavo_server.app import create_app


@dataclass
class Service:
    """A running server: its engine, and a client for it."""

    engine: AsyncEngine
    client: httpx.AsyncClient
    url: str


@pytest.fixture
def factory() -> str:
    """Which engine of fake_engine runs; a test's parameter may name another."""
    return "start"


@pytest.fixture
def config() -> EngineConfig:
    """The engine's configuration; a test's parameter may be another."""
    return EngineConfig()


@pytest.fixture
def settings() -> ApiSettings:
    """The API's settings; a test's parameter may be others."""
    return ApiSettings()


@pytest.fixture
async def service(
    tokenizer: Tokenizer, factory: str, config: EngineConfig, settings: ApiSettings, helpers_in_child: None
) -> AsyncIterator[Service]:
    """A server that listens on a free port, with its engine ready."""
    engine = await AsyncEngine.start(config, factory=f"fake_engine:{factory}", tokenizer=tokenizer)
    try:
        async with _served(engine, settings) as service:
            yield service
    finally:
        await engine.shutdown()


@asynccontextmanager
async def _served(engine: AsyncEngine, settings: ApiSettings) -> AsyncIterator[Service]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(engine, settings=settings)
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            yield Service(engine, client, url)
        server.should_exit = True
        await task
