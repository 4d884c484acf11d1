"""Keys, origins, TLS and where the server listens."""

import asyncio
import json
import shutil
import socket
import ssl
from pathlib import Path
from typing import Any

import fake_engine
import httpx
import pytest
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.text.tokenizer import Tokenizer
from octavo_server import security, serve
from octavo_server.security import ALWAYS_OPEN, DOCS, read_keys
from octavo_server.settings import ServerSettings
from octavo_server.welcome import layer_lines, memory_lines, welcome
from servers import live_server

TLS = Path(__file__).parents[1] / "data" / "tls"
pytestmark = pytest.mark.usefixtures("helpers_in_child")


@pytest.fixture(autouse=True)
def no_keys_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names no key."""
    for name in ("OCTAVO_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def _app(*keys: str, **settings: Any) -> Any:
    """The app over an engine that is never started: what needs no engine can be asked."""
    return serve.build_app(AsyncEngine(EngineConfig()), ServerSettings(**settings), None, keys)


def _client(app: Any, **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, **options)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def _routes(app: Any) -> list[tuple[str, str]]:
    return [(method, route.path) for route in app.routes for method in sorted(route.methods)]


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_every_route_but_the_open_ones_asks_for_a_key() -> None:
    app = _app("one", "two")
    routes = _routes(app)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", *DOCS} <= {path for _, path in routes}
    async with _client(app) as client:
        for method, path in [*routes, ("GET", "/nothing"), ("GET", "/live/"), ("OPTIONS", "/v1/models")]:
            for headers in ({}, _bearer("three"), {"Authorization": "one"}, {"Authorization": "Basic one"}):
                response = await client.request(method, path, headers=headers)
                if path in ALWAYS_OPEN:
                    assert response.status_code != 401
                    continue
                assert response.status_code == 401, (method, path, headers)
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    error = response.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"}
                    assert error["code"] == "invalid_api_key" and "Authorization: Bearer" in error["message"]
            for key in ("one", "two"):
                assert (await client.request(method, path, headers=_bearer(key))).status_code != 401


async def test_named_routes_are_open_too() -> None:
    async with _client(_app("one", open_routes=("/version",))) as client:
        assert (await client.get("/version")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401


async def test_without_keys_nothing_is_asked() -> None:
    async with _client(_app()) as client:
        assert (await client.get("/version")).status_code == 200


async def test_all_keys_are_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    original = security.hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(len(one) + len(other))
        return original(one, other)

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    async with _client(_app("short", "a" * 100, "other")) as client:
        for key in ("short", "other", "wrong"):
            await client.get("/version", headers=_bearer(key))
    assert compared == [64] * 9


async def test_keys_hold_behind_a_proxy_that_leaves_its_path_on() -> None:
    async with _client(_app("one", root_path="/llm")) as client:
        for prefix in ("", "/llm"):
            assert (await client.get(f"{prefix}/live")).status_code == 200
            assert (await client.get(f"{prefix}/version")).status_code == 401
            assert (await client.get(f"{prefix}/version", headers=_bearer("one"))).status_code == 200


async def test_docs_can_be_left_out() -> None:
    async with _client(_app()) as client:
        assert (await client.get("/openapi.json")).status_code == 200
    async with _client(_app(disable_fastapi_docs=True)) as client:
        for path in DOCS:
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/version")).status_code == 200


def test_keys_come_from_flags_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from octavo.cli import Parser
    from octavo.config_args import resolve
    from octavo_server.serve import ServeCommand

    file = tmp_path / "keys"
    file.write_text("# ours\n\n  one \ntwo\n")
    parser = Parser(prog="octavo serve")
    ServeCommand().add_arguments(parser)

    def keys(*flags: str) -> tuple[str, ...]:
        return read_keys(resolve(ServerSettings, parser.parse_args(list(flags))))

    assert keys() == ()
    assert keys("--api-key", "a", "b", "--api-key", "c") == ("a", "b", "c")
    assert keys("--api-key", "one", "--api-key-file", str(file)) == ("one", "two")
    monkeypatch.setenv("VLLM_API_KEY", "theirs")
    assert keys() == ("theirs",) and "VLLM_API_KEY" in caplog.text
    monkeypatch.setenv("OCTAVO_API_KEY", "ours")
    assert keys() == ("ours",) and keys("--api-key", "a") == ("a",)


@pytest.mark.parametrize("content", ["", "# nothing\n", None])
def test_file_without_keys_never_opens_the_server(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="--api-key-file"):
        read_keys(ServerSettings(api_key_file=str(file)))


@pytest.mark.parametrize("key", ["é", "a\nb", " a"])
def test_keys_that_no_header_carries_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="number 2"):
        read_keys(ServerSettings(api_key=("a", key)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key": ()}, "--api-key .* empty"),
        ({"api_key": ("",)}, "--api-key .* empty"),
        ({"api_key_file": ""}, "--api-key-file"),
        ({"open_routes": ("metrics",)}, "'metrics'"),
        ({"ssl_keyfile": "k"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 2}, "--ssl-cert-reqs 2 needs --ssl-ca-certs"),
        ({"ssl_certfile": "c", "ssl_cert_reqs": 3}, "--ssl-cert-reqs is 3"),
        ({"allow_credentials": True}, "--allow-credentials"),
        ({"allow_credentials": True, "allowed_origins": ('["*"]',)}, "--allow-credentials"),
        ({"allowed_origins": ("[1]",)}, "--allowed-origins"),
        ({"max_body_bytes": 0}, "--max-body-bytes is 0, but must be at least 1"),
        ({"max_num_queued_reqs": -1}, "--max-num-queued-reqs is -1"),
        ({"engine_timeout": 0.0}, "--engine-timeout is 0"),
        ({"engine_timeout": float("nan")}, "--engine-timeout is nan"),
        ({"root_path": "llm"}, "--root-path is 'llm'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**settings)


async def test_no_page_of_another_origin_may_call_unless_named() -> None:
    asks = {"Origin": "https://page", "Access-Control-Request-Method": "POST"}
    async with _client(_app()) as client:
        response = await client.get("/version", headers=asks)
        assert not [name for name in response.headers if name.startswith("access-control")]
    async with _client(_app("one", allowed_origins=('["https://page"', '"https://other"]'))) as client:
        response = await client.options("/v1/completions", headers=asks)  # browsers send no key with this
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://page"
        response = await client.get("/version", headers=asks)
        assert response.status_code == 401 and response.headers["access-control-allow-origin"] == "https://page"
        response = await client.options("/v1/completions", headers={**asks, "Origin": "https://evil"})
        assert response.status_code == 400 and "access-control-allow-origin" not in response.headers


def _tls(name: str, **more: Any) -> ServerSettings:
    return ServerSettings(port=0, ssl_certfile=str(TLS / f"{name}.pem"), ssl_keyfile=str(TLS / f"{name}.key"), **more)


def _trusting(*names: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for name in names:
        context.load_verify_locations(TLS / f"{name}.pem")
    return context


async def test_tls(tokenizer: Tokenizer) -> None:
    async with live_server(tokenizer, _tls("first"), verify=_trusting("first")) as live:
        assert live.url.startswith("https://")
        assert (await live.client.get("/live")).status_code == 200
        async with httpx.AsyncClient() as plain:
            with pytest.raises(httpx.HTTPError):
                await plain.get(live.url.replace("https", "http") + "/live")


async def test_client_certificates(tokenizer: Tokenizer) -> None:
    settings = _tls("first", ssl_ca_certs=str(TLS / "second.pem"), ssl_cert_reqs=2)
    known = _trusting("first")
    known.load_cert_chain(TLS / "second.pem", TLS / "second.key")
    async with live_server(tokenizer, settings, verify=known) as live:
        assert (await live.client.get("/live")).status_code == 200
        async with httpx.AsyncClient(verify=_trusting("first")) as unknown:
            with pytest.raises(httpx.HTTPError):
                await unknown.get(f"{live.url}/live")


async def test_new_certificate_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("pem", "key"):
        shutil.copy(TLS / f"first.{kind}", tmp_path / f"one.{kind}")
    settings = ServerSettings(
        port=0, ssl_certfile=str(tmp_path / "one.pem"), ssl_keyfile=str(tmp_path / "one.key"), enable_ssl_refresh=True
    )
    monkeypatch.setattr(serve, "_REFRESH_SECONDS", 0.02)
    engine = AsyncEngine(EngineConfig())
    server = serve._Server(engine, serve.build_app(engine, settings), settings)
    server.config.load()
    refresh = asyncio.create_task(serve._refresh_certificate(server, settings))
    await asyncio.sleep(0.1)
    for kind in ("key", "pem"):
        shutil.copy(TLS / f"second.{kind}", tmp_path / f"one.{kind}")
    async with asyncio.timeout(5):
        while await _handshake(server.config.ssl) != "octavo test second":
            await asyncio.sleep(0.05)
    refresh.cancel()


async def _handshake(context: ssl.SSLContext | None) -> str:
    """The name of the certificate that a new connection gets."""
    async with await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=_trusting("first", "second"))
        certificate = writer.get_extra_info("peercert")
        writer.close()
    return str(dict(pair for (pair,) in certificate["subject"])["commonName"])


@pytest.mark.parametrize("files", [("missing.pem", "first.key"), ("first.pem", "second.key"), ("first.key", None)])
def test_certificates_that_do_not_serve_are_one_sentence(files: tuple[str, str | None]) -> None:
    certificate, key = files
    settings = ServerSettings(ssl_certfile=str(TLS / certificate), ssl_keyfile=str(TLS / key) if key else None)
    with pytest.raises(ConfigError, match=f"The TLS flags do not serve .*{certificate}"):
        security.tls_options(settings)


async def test_unix_socket(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # what a killed server leaves
    settings = ServerSettings(uds=str(path))
    async with live_server(tokenizer, settings, transport=httpx.AsyncHTTPTransport(uds=str(path))) as live:
        answer = await live.client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 4})
        assert answer.json()["choices"][0]["text"] == "abab"
        with pytest.raises(ConfigError, match=f"cannot listen on {path}: .*--uds"):
            serve._listen_unix(str(path))
        assert (await live.client.get("/live")).status_code == 200
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="--uds"):
        serve._listen_unix(str(path))
    assert path.read_text() == "precious"


def _welcome(host: str, guarded: bool, **settings: Any) -> tuple[str, int]:
    info = fake_engine.info()
    info.memory = {"weights": 3 << 20, "KV cache": 5 << 20}
    with socket.create_server((host, 0)) as listener:
        text = welcome(info, listener, ServerSettings(**settings), 1.0, guarded=guarded)
        return text, listener.getsockname()[1]


def test_welcome_tells_what_was_selected_and_the_memory_and_ends_with_a_request() -> None:
    text, port = _welcome("127.0.0.1", guarded=False)
    lines = text.splitlines()
    assert "KV cache scales: calibrated now." in lines
    chosen = [
        "attention backend: one [fake, fakes 1.0]",
        "    not other [fake]: it is not there",
        "matmul: two [fake, fakes 1.0]",
        "    not other [fake]: it is not there",
    ]
    assert lines[:4] == chosen  # equal selections once
    assert lines[4] == "Memory:" and [line.split()[-2:] for line in lines[5:8]] == [
        ["3.0", "MiB"],
        ["5.0", "MiB"],
        ["8.0", "MiB"],
    ]
    assert f"at http://127.0.0.1:{port}." in text and "Warning" not in text
    start, _, body = lines[-1].partition(" -d '")
    assert start == f"curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json'"
    assert json.loads(body.removesuffix("'"))["temperature"] == 0


def test_layers_are_summed_up_by_weight_matmul_and_fallback() -> None:
    def entry(layers: list[str], weight: str, matmul: str, fallback: str | None = None) -> dict[str, Any]:
        sizes = {"stored_bytes": 1 << 20, "resident_bytes": 2 << 20}
        return {"layers": layers, "weight": weight, "matmul": matmul, "fallback": fallback, **sizes}

    layers = [
        entry(["q", "k", "v"], "4-bit integers", "torch_int4"),
        entry(["down"], "4-bit integers", "torch", "no kernel fits."),
        entry(["o"], "4-bit integers", "torch_int4"),
        entry(["lm_head"], "dense bfloat16", "torch"),
    ]
    expected = [
        "6 linear layers:",
        "    4 x 4-bit integers -> torch_int4 (2.0 MiB stored, 4.0 MiB in memory)",
        "    1 x 4-bit integers -> dequantized at load, torch (1.0 MiB stored, 2.0 MiB in memory)",
        "        because: no kernel fits.",
        "    1 x dense bfloat16 -> torch (1.0 MiB stored, 2.0 MiB in memory)",
    ]
    assert layer_lines(layers) == expected
    assert layer_lines([]) == []
    info = fake_engine.info()
    info.layers = layers
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = welcome(info, listener, ServerSettings(), 1.0, guarded=False)
    assert "\n".join(expected) in text


def test_memory_is_told_as_planned_and_as_measured() -> None:
    info = fake_engine.info()
    info.memory = {"weights": 3 << 20, "graphs": 2 << 20, "activations": 0}
    info.memory_measured = {"weights": 0, "graphs": 1 << 20}
    title, weights, graphs, together = memory_lines(info)
    assert (title, weights.split(), together.split()) == (
        "Memory:",
        ["weights", "3.0", "MiB"],
        ["together", "5.0", "MiB"],
    )
    assert graphs.split() == ["graphs", "2.0", "MiB,", "measured", "1.0", "MiB"]


def test_welcome_shows_no_key_and_warns_of_an_open_door() -> None:
    text, port = _welcome("0.0.0.0", guarded=True, api_key=("secret",))
    assert "secret" not in text and "Warning" not in text
    assert f"curl http://127.0.0.1:{port}/" in text and "Bearer $OCTAVO_API_KEY" in text
    assert "--api-key-file" in _welcome("0.0.0.0", guarded=False)[0]
    assert "curl --unix-socket /s http://localhost/v1" in _welcome("127.0.0.1", guarded=False, uds="/s")[0]
