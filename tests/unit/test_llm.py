"""The offline class over an engine without a model: prompts of every kind, order, validation first, Ctrl-C."""

import signal
from collections.abc import Iterator
from typing import Any

import fake_engine
import pytest
from octavo.config import EngineConfig
from octavo.engine.step import TokenEvent
from octavo.errors import ConfigError, RequestError
from octavo.llm import LLM
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

FIVE = SamplingParams(max_tokens=5)


class InterruptedEngine(fake_engine.FakeEngine):
    """Gets Ctrl-C in the middle of its third step, and keeps what it has generated."""

    def step(self) -> list[TokenEvent]:
        events = super().step()
        if self.num_steps == 3:
            signal.raise_signal(signal.SIGINT)
        self.whole_steps = self.num_steps
        return events


@pytest.fixture
def engine() -> fake_engine.FakeEngine:
    return fake_engine.FakeEngine()


@pytest.fixture
def llm(engine: fake_engine.FakeEngine, tokenizer: Tokenizer) -> LLM:
    return _llm(engine, tokenizer)


def _llm(engine: fake_engine.FakeEngine, tokenizer: Tokenizer, **config: Any) -> LLM:
    return LLM.from_engine(EngineConfig(**config), engine, fake_engine.info(), tokenizer)  # type: ignore[arg-type]


def _texts(outputs: list[RequestOutput]) -> list[str]:
    return [choice.text for output in outputs for choice in output.outputs]


def test_prompts_of_every_kind(llm: LLM, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("abc")
    for one in ("abc", tokens, {"prompt": "abc"}, {"prompt_token_ids": tokens}, ["abc"], [tokens]):
        (output,) = llm.generate(one, FIVE)
        assert _texts([output]) == ["abcab"]
        assert output.prompt_token_ids == tokens and output.finished
        assert output.prompt == ("abc" if one in ("abc", ["abc"], {"prompt": "abc"}) else None)
    assert llm.generate([], FIVE) == []


def test_answers_keep_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=number) for number in (9, 1, 5)]
    outputs = llm.generate(["ab", "c", "de"], params)
    assert _texts(outputs) == ["ababababa", "c", "deded"]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3


def test_choices_and_stop_strings(llm: LLM, engine: fake_engine.FakeEngine) -> None:
    (output,) = llm.generate("abcd", SamplingParams(n=2, max_tokens=9, stop=("d",)))
    assert _texts([output]) == ["abc", "bc"]
    assert engine.running == {} and sorted(choice or 0 for _, choice in engine.aborted) == [0, 1]


def test_everything_is_checked_before_anything_runs(llm: LLM, engine: fake_engine.FakeEngine) -> None:
    with pytest.raises(RequestError, match=r"3 tokens and max_tokens is 62.*context is 64"):
        llm.generate(["ab", "abc"], [FIVE, SamplingParams(max_tokens=62)])
    with pytest.raises(RequestError, match="2 prompts, but 1 sampling_params"):
        llm.generate(["ab", "abc"], [FIVE])
    with pytest.raises(RequestError, match=r"'prompt' or 'prompt_token_ids', but holds \['x'\]"):
        llm.generate({"x": 1}, FIVE)
    assert engine.num_steps == 0 and engine.running == {}


def test_refusal_of_the_engine_leaves_nothing_running(llm: LLM, engine: fake_engine.FakeEngine) -> None:
    with pytest.raises(RequestError, match="at most 8 run"):
        llm.generate(["ab", "abc"], [FIVE, SamplingParams(n=9)])
    assert engine.running == {}
    assert _texts(llm.generate("ab", FIVE)) == ["ababa"]


def test_failed_request_says_why_and_the_others_go_on(llm: LLM) -> None:
    bad, good = llm.generate([[1, fake_engine.FAIL], [70, 71]], FIVE)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].error) == ("error", "the step failed on purpose")
    assert good.outputs[0].token_ids == [70, 71, 70, 71, 70]


@pytest.fixture
def usual_handler() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, whatever ran before this test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_own_handler_of_interrupts_is_called_after_the_step(tokenizer: Tokenizer) -> None:
    engine, calls = InterruptedEngine(), []
    before = signal.signal(signal.SIGINT, lambda *_: calls.append(engine.whole_steps))
    try:
        (output,) = _llm(engine, tokenizer).generate("abc", FIVE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert calls == [3] and output.outputs[0].text == "abcab"


@pytest.mark.usefixtures("usual_handler")
def test_interrupt_waits_for_the_step_and_leaves_the_engine_usable(tokenizer: Tokenizer) -> None:
    engine = InterruptedEngine()
    llm = _llm(engine, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "d"], SamplingParams(max_tokens=50))
    assert engine.whole_steps == 3  # the step ran to its end
    assert engine.running == {} and len(engine.aborted) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert _texts(llm.generate("abc", FIVE)) == ["abcab"]


def test_chat_of_one_conversation_or_many(llm: LLM, tokenizer: Tokenizer) -> None:
    one = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(one, FIVE)
    assert output.prompt_token_ids == tokenizer.encode("user:hi;>")
    outputs = llm.chat([one, [*one, {"role": "assistant", "content": "x"}]], FIVE, add_generation_prompt=False)
    assert [output.prompt_token_ids for output in outputs] == [
        tokenizer.encode("user:hi;"),
        tokenizer.encode("user:hi;assistant:x;"),
    ]


def test_generation_config_is_the_default_unless_it_is_off(
    engine: fake_engine.FakeEngine, tokenizer: Tokenizer
) -> None:
    assert _llm(engine, tokenizer).default_sampling_params() == SamplingParams(temperature=0.5)
    assert _llm(engine, tokenizer, generation_config="octavo").default_sampling_params() == SamplingParams()
    assert len(_llm(engine, tokenizer).generate("a")[0].outputs[0].token_ids) == 16


def test_progress_bar_counts_requests_and_tells_the_rate(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["ab", "c"], FIVE)
    shown = capsys.readouterr().err
    assert "Generating: 100%" in shown and "2/2" in shown and "tokens/s" in shown
    llm.generate("ab", FIVE, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_the_engines_own_calls(llm: LLM, engine: fake_engine.FakeEngine, tokenizer: Tokenizer) -> None:
    with llm as same:
        assert same is llm and llm.get_tokenizer() is tokenizer
        assert llm.reset_prefix_cache() is True and engine.num_resets == 1
        engine.add_request("x", [1], FIVE)
    assert engine.running == {}  # shut down


def test_unknown_argument_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(max_model_length=5)
