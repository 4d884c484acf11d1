"""The process boundary with an engine without a model at the other end: streams, aborts, failures, and no leftovers."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import fake_engine
import pytest
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.errors import ConfigError, EngineDeadError, RequestError
from octavo.output_processor import Delta
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("helpers_in_child")
FOREVER = SamplingParams(max_tokens=60, ignore_eos=True)


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets go, so that a test can see what is left."""
    directory = Path(tempfile.mkdtemp(prefix="o"))  # pytest's own are too long for a socket's path
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


@asynccontextmanager
async def _engine(tokenizer: Tokenizer, factory: str = "start") -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(EngineConfig(), factory=f"fake_engine:{factory}", tokenizer=tokenizer)
    try:
        yield engine
    finally:
        await engine.shutdown()


def _pid(engine: AsyncEngine) -> int:
    assert engine._link is not None
    return engine._link.process.pid


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def _until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def _until_idle(engine: AsyncEngine) -> None:
    async with asyncio.timeout(5):
        while (await engine.stats()).num_running:
            await asyncio.sleep(0.01)


async def test_streams_text_and_leaves_nothing(tokenizer: Tokenizer, temporary: Path) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        assert engine.ready and engine.info.model == "fake"
        assert list(temporary.iterdir()) == []  # the socket is gone as soon as it is connected
        pid = _pid(engine)
        deltas = [delta async for delta in engine.generate("a", "abc", SamplingParams(max_tokens=7))]
        assert "".join(delta.text for delta in deltas) == "abcabca"
        assert [delta.finish_reason for delta in deltas] == [None] * 6 + ["length"]
        assert [delta.num_cached_tokens for delta in deltas] == [1] + [None] * 6
    assert not _alive(pid)
    assert list(temporary.iterdir()) == []
    assert isinstance(engine.dead, EngineDeadError)


async def test_requests_run_together_and_do_not_mix(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        prompts = ["abc", "x", "hello world", "é"] * 4
        outputs = await asyncio.gather(*(engine.complete("same", p, SamplingParams(max_tokens=9)) for p in prompts))
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = tokenizer.encode(prompt)
            assert output.prompt_token_ids == tokens
            assert output.outputs[0].token_ids == (tokens * 9)[:9]
        assert (await engine.stats()).num_steps < 9 * len(prompts) / 2


async def test_choices_stop_one_by_one(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer) as engine:
        output = await engine.complete("a", "abcd", SamplingParams(n=3, max_tokens=4, stop=("d",)))
        assert [choice.text for choice in output.outputs] == ["abc", "bc", "c"]
        await _until_idle(engine)
        assert (await engine.stats()).num_generated_tokens <= 12


async def test_stop_string_ends_the_request_in_the_engine(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        output = await engine.complete("a", "abcd", SamplingParams(max_tokens=60, stop=("cd",)))
        assert output.outputs[0].text == "ab"
        await _until_idle(engine)
        assert (await engine.stats()).num_generated_tokens < 20


async def test_closing_the_iterator_aborts(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        async with aclosing(engine.generate("a", "abc", FOREVER)) as deltas:  # type: ignore[type-var]
            assert (await anext(deltas)).text == "a"
            assert (await engine.stats()).num_running == 1
        assert (await engine.stats()).num_running == 0


async def test_cancelling_aborts(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        task = asyncio.create_task(engine.complete("a", "abc", FOREVER))
        await asyncio.sleep(0.1)
        assert (await engine.stats()).num_running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.stats()).num_running == 0


async def test_reset_prefix_cache_tells_whether_it_did(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        assert await engine.reset_prefix_cache() is True
        async with aclosing(engine.generate("a", "abc", FOREVER)) as deltas:  # type: ignore[type-var]
            await anext(deltas)
            assert await engine.reset_prefix_cache() is False


@pytest.mark.parametrize(
    ("prompt", "params", "field", "numbers"),
    [
        ([], {}, "prompt", "empty"),
        ([1] * 64, {}, "prompt", r"64 tokens.*context of 64"),
        ([1] * 60, {"max_tokens": 5}, "max_tokens", r"60 tokens and max_tokens is 5, together 65.*is 64"),
        ([300], {}, "prompt", r"300.*0 to 299"),
        ([-1], {}, "prompt", r"-1.*0 to 299"),
        ([1], {"logit_bias": {300: 1.0}}, "logit_bias", r"300.*0 to 299"),
        ([1], {"stop_token_ids": (400,)}, "stop_token_ids", r"400.*0 to 299"),
        ([1], {"logprobs": 21}, "logprobs", r"21.*20"),
        ("x" * 400, {}, "prompt", r"400 characters.*320.*64 tokens"),
        ("\ud800", {}, "prompt", "surrogate"),
    ],
)
async def test_refuses_what_cannot_be_served(
    tokenizer: Tokenizer, prompt: str | list[int], params: dict[str, object], field: str, numbers: str
) -> None:
    engine = AsyncEngine(EngineConfig(), tokenizer=tokenizer)
    engine._info = fake_engine.info()
    with pytest.raises(RequestError, match=numbers) as caught:
        await engine.complete("a", prompt, SamplingParams(**params))  # type: ignore[arg-type]
    assert caught.value.field == field
    await engine.shutdown()


async def test_refusal_of_the_engine_comes_back(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer) as engine:
        with pytest.raises(RequestError, match="at most 8 run") as caught:
            await engine.complete("a", "abc", SamplingParams(n=9))
        assert caught.value.field == "n"
        assert (await engine.complete("a", "abc", SamplingParams(max_tokens=1))).outputs[0].text == "a"


async def test_error_of_one_request_is_its_output(tokenizer: Tokenizer) -> None:
    async with _engine(tokenizer) as engine:
        output = await engine.complete("a", [1, fake_engine.FAIL], SamplingParams())
        assert (output.outputs[0].finish_reason, output.outputs[0].error) == ("error", "the step failed on purpose")
        assert engine.dead is None


async def _expect_death(engine: AsyncEngine, strike: Callable[[], object], message: str) -> None:
    """Every open request and call ends with the reason within a second of the strike."""
    first: list[Delta] = []

    async def consume() -> None:
        async for delta in engine.generate("a", "abc", FOREVER):
            first.append(delta)

    tasks = [asyncio.create_task(consume()) for _ in range(3)]
    tasks += [asyncio.create_task(engine.complete("b", "abc", FOREVER)) for _ in range(3)]  # type: ignore[arg-type]
    await _until(lambda: len(first) >= 3)
    strike()
    async with asyncio.timeout(1):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        assert isinstance(result, EngineDeadError)
        assert message in str(result)
    assert engine.dead is results[0] and not engine.ready
    assert await engine.wait_dead() is engine.dead
    with pytest.raises(EngineDeadError):
        await engine.complete("c", "abc", FOREVER)
    with pytest.raises(EngineDeadError):
        await engine.stats()


async def test_killed_engine_ends_every_request(tokenizer: Tokenizer, temporary: Path) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        await _expect_death(engine, lambda: os.kill(_pid(engine), signal.SIGKILL), "signal 9")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("token", "message"),
    [(fake_engine.CRASH, "RuntimeError: the kernel is broken"), (fake_engine.EXIT, "exit status 3")],
)
async def test_engine_that_breaks_ends_every_request(tokenizer: Tokenizer, token: int, message: str) -> None:
    async with _engine(tokenizer, "start_slow") as engine:
        bad: list[asyncio.Task[object]] = []

        def strike() -> None:
            bad.append(asyncio.create_task(engine.complete("bad", [1, token], FOREVER)))

        await _expect_death(engine, strike, message)
        with pytest.raises(EngineDeadError):
            await bad[0]
        await _until(lambda: not _alive(_pid(engine)))


@pytest.mark.parametrize(
    ("factory", "kind", "message"),
    [
        ("refuse", ConfigError, "block_size is 16, which this engine does not like."),
        ("break_down", EngineDeadError, "ZeroDivisionError: a bug"),
        ("die", EngineDeadError, "exit status 7"),
        ("no_such_function", EngineDeadError, "no_such_function"),
    ],
)
async def test_failed_start_says_why(
    tokenizer: Tokenizer, temporary: Path, factory: str, kind: type[Exception], message: str
) -> None:
    engine = AsyncEngine(EngineConfig(), factory=f"fake_engine:{factory}", tokenizer=tokenizer)
    with pytest.raises(kind, match=message) as caught:
        await engine.launch()
    assert type(caught.value) is kind and engine.dead is caught.value and not engine.ready
    assert not _alive(_pid(engine)) and list(temporary.iterdir()) == []


async def test_phases_of_the_start_are_told(tokenizer: Tokenizer) -> None:
    phases: list[str] = []
    engine = await AsyncEngine.start(
        EngineConfig(), factory="fake_engine:start_late", tokenizer=tokenizer, progress=phases.append
    )
    assert phases == ["loading weights", "warming up", "ready"] and engine.phase == "ready"
    await engine.shutdown()


async def test_cancelled_start_leaves_nothing(tokenizer: Tokenizer, temporary: Path) -> None:
    engine = AsyncEngine(EngineConfig(), factory="fake_engine:start_late", tokenizer=tokenizer)
    task = asyncio.create_task(engine.launch())
    await _until(lambda: engine.phase == "loading weights")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _alive(_pid(engine)) and list(temporary.iterdir()) == []


_PARENT = """
import asyncio, sys
from octavo.async_engine import AsyncEngine
from octavo.config import EngineConfig
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer
from pathlib import Path

async def main():
    tokenizer = Tokenizer.from_files(Path(sys.argv[1]))
    engine = await AsyncEngine.start(EngineConfig(), factory="fake_engine:start_slow", tokenizer=tokenizer)
    async for delta in engine.generate("a", "abc", SamplingParams(max_tokens=60)):
        print(engine._link.process.pid, "torch" in sys.modules, flush=True)

asyncio.run(main())
"""


def test_engine_ends_when_its_parent_is_killed_and_the_parent_imports_no_torch(temporary: Path) -> None:
    from tiny_tokenizer import write_tokenizer

    files = temporary / "files"
    files.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", _PARENT, str(write_tokenizer(files))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid, torch = parent.stdout.readline().split()
        assert torch == "False"
        parent.kill()
    asyncio.run(_until(lambda: not _alive(int(pid))))
    assert list(temporary.iterdir()) == [files]
