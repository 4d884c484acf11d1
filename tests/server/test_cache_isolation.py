"""--isolate-cache-by-key: what one key has sent is found in the prefix cache by no other."""

from typing import Any

import httpx
import pytest
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.text.tokenizer import Tokenizer
from octavo_server.security import read_keys
from octavo_server.serve import build_app
from octavo_server.settings import ServerSettings

pytestmark = pytest.mark.usefixtures("helpers_in_child")
PROMPT = [1, 2, 3, 4] * 5
KEYS = ("one", "two")


async def _cached(tokenizer: Tokenizer, settings: ServerSettings, asks: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """The cached tokens of requests in turn, each with a key and more fields."""
    engine = await AsyncEngine.start(EngineConfig(), factory="hash_engine:start", tokenizer=tokenizer)
    found = []
    transport = httpx.ASGITransport(build_app(engine, settings, None, KEYS))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for key, more in asks:
            body = {"prompt": PROMPT, "max_tokens": 1, "ignore_eos": True, **more}
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = (await client.post("/v1/completions", json=body, headers=headers)).raise_for_status().json()
            found.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    await engine.shutdown()
    return found


async def test_keys_share_a_prefix_unless_isolated(tokenizer: Tokenizer) -> None:
    asks: list[tuple[str, dict[str, Any]]] = [("one", {}), ("one", {}), ("two", {}), ("two", {}), ("one", {})]
    assert await _cached(tokenizer, ServerSettings(), asks) == [0, 16, 16, 16, 16]
    assert await _cached(tokenizer, ServerSettings(isolate_cache_by_key=True), asks) == [0, 16, 0, 16, 16]


async def test_a_salt_divides_within_a_key_and_reaches_no_other(tokenizer: Tokenizer) -> None:
    from hashlib import sha256

    settings = ServerSettings(isolate_cache_by_key=True, open_routes=("/v1/completions",))
    guess = sha256(b"one").hexdigest() + ":"
    asks: list[tuple[str, dict[str, Any]]] = [
        ("one", {}),
        ("one", {"cache_salt": "s"}),
        ("one", {"cache_salt": "s"}),
        ("two", {"cache_salt": "s"}),
        ("", {"cache_salt": guess}),
        ("", {}),
    ]
    assert await _cached(tokenizer, settings, asks) == [0, 0, 16, 0, 0, 0]


def test_isolation_without_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match="--isolate-cache-by-key needs keys"):
        read_keys(ServerSettings(isolate_cache_by_key=True))
    assert read_keys(ServerSettings(isolate_cache_by_key=True, api_key=("one",))) == ("one",)
