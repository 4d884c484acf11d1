"""The whole way with the default model: `octavo serve`, the process boundary, a real engine."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

pytestmark = pytest.mark.model
QUESTION = "Name the capital of France."


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """A server's URL and process id; at the end it is asked to stop, and must."""
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0", "--max-model-len", "1k"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if (ready := re.search(r"Ready after .* at (http\S+)\.", line)) is not None:
                break
        else:
            raise AssertionError(f"The server did not start:\n{said}")
        yield ready[1], process.pid
        process.terminate()
        assert process.wait(60) == 0


async def test_names_paris_whole_and_streamed(server: tuple[str, int]) -> None:
    url, _ = server
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        asked = {
            "model": "SmolLM2-135M-Instruct",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
            "max_tokens": 32,
        }
        whole = await client.chat.completions.create(**asked)  # type: ignore[call-overload]
        assert "Paris" in whole.choices[0].message.content
        stream = await client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content


def test_the_same_prompt_again_is_found_in_the_cache(server: tuple[str, int]) -> None:
    url, _ = server
    body = {"prompt": "one two three " * 20, "max_tokens": 2, "temperature": 0}
    first, second = (httpx.post(f"{url}/v1/completions", json=body, timeout=120).json() for _ in range(2))
    assert second["choices"][0]["text"] == first["choices"][0]["text"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= second["usage"]["prompt_tokens"] - 16


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_api_process_loads_no_torch(server: tuple[str, int]) -> None:
    _, pid = server
    (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert "libtorch" in Path(f"/proc/{engine}/maps").read_text()
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
