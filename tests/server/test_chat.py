"""`octavo chat` against a server, as a user has it."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from octavo.text.tokenizer import Tokenizer
from octavo_server.settings import ServerSettings
from servers import Live, live_server

pytestmark = pytest.mark.usefixtures("helpers_in_child")


async def _chat(live: Live, *flags: str, said: str = "", key: str = "") -> tuple[int, str, str]:
    """The exit status of the command, what it printed, and what it complained of."""
    environment = {name: value for name, value in os.environ.items() if name != "OCTAVO_API_KEY"}
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "octavo", "chat", "--url", live.url, *flags],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment | ({"OCTAVO_API_KEY": key} if key else {}),
    )
    output, complaints = await asyncio.wait_for(process.communicate(said.encode()), 30)
    assert process.returncode is not None
    return process.returncode, output.decode(), complaints.decode()


async def test_one_question(tokenizer: Tokenizer) -> None:
    async with live_server(tokenizer, ServerSettings(port=0), keys=("key",)) as live:
        asked = ["-q", "hi", "--max-tokens", "9", "--temperature", "0", "--model", "fake"]
        assert (await _chat(live, *asked, key="key"))[:2] == (0, "user:hi;>\n")
        assert (await _chat(live, *asked, "--system", "s", "--api-key", "key"))[:2] == (0, "system:s;\n")
        status, output, complaints = await _chat(live, *asked)
        assert (status, output) == (1, "") and "401" in complaints and "API key" in complaints
        status, _, complaints = await _chat(live, *asked[:-1], "other", key="key")
        assert status == 1 and "'other' is not served here" in complaints


async def test_a_conversation_is_remembered_until_it_is_cleared(tokenizer: Tokenizer) -> None:
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        said = "ab\n\ncd\n/clear\nef\n/exit\nnever asked\n"
        status, output, _ = await _chat(live, "--max-tokens", "12", said=said)
        assert status == 0
        assert output == "user:ab;>use\nuser:ab;assi\nuser:ef;>use\n"  # the fake engine repeats its prompt


async def test_a_message_that_is_refused_does_not_end_the_conversation(tokenizer: Tokenizer) -> None:
    async with live_server(tokenizer, ServerSettings(port=0)) as live:
        status, output, complaints = await _chat(live, "--max-tokens", "9", said=f"{'x' * 400}\nhi\n")
        assert (status, output) == (0, "user:hi;>\n") and "400" in complaints


async def test_ctrl_c_stops_an_answer_and_frees_its_request(tokenizer: Tokenizer, tmp_path: Path) -> None:
    async with live_server(tokenizer, ServerSettings(port=0), "start_slow") as live:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "octavo", "chat", "--url", f"{live.url}/v1/"],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hi\n")
        assert await asyncio.wait_for(process.stdout.readexactly(4), 10) == b"user"
        process.send_signal(2)
        async with asyncio.timeout(5):
            while (await live.engine.stats()).num_running:
                await asyncio.sleep(0.01)
        process.stdin.write(b"/exit\n")
        _, complaints = await asyncio.wait_for(process.communicate(), 10)
        assert process.returncode == 0 and b"[stopped]" in complaints


@pytest.mark.parametrize(
    ("url", "words"),
    [("ftp://x", "--url is 'ftp://x'"), ("http://127.0.0.1:1", "127.0.0.1:1 cannot be asked"), ("http://x:y", "--url")],
)
async def test_servers_that_are_not_there(tokenizer: Tokenizer, url: str, words: str) -> None:
    status, output, complaints = await _chat(Live(None, None, url), "-q", "hi")  # type: ignore[arg-type]
    assert status in (1, 2) and output == "" and words in complaints


def test_events_that_report_an_error_are_told() -> None:
    from http.client import HTTPResponse
    from typing import cast

    from octavo_server.chat import ChatError, _pieces

    events = [{"choices": [{"delta": {"content": "a"}}]}, {"choices": []}, {"error": {"message": "it broke"}}]
    lines = [b"data: " + json.dumps(event).encode() + b"\n" for event in events]
    pieces = _pieces(cast(HTTPResponse, lines))
    assert next(pieces) == "a"
    with pytest.raises(ChatError, match="it broke"):
        next(pieces)
