"""Token events to text: stop strings, late tokens, logprobs, reasons."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.engine.step import TokenEvent, TokenLogprob
from octavo.output_processor import Delta, OutputProcessor
from octavo.outputs import Logprob
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

PROMPT = [1, 2, 3]


def _processor(tokenizer: Tokenizer, **params: object) -> OutputProcessor:
    return OutputProcessor("r", "text", PROMPT, SamplingParams(**params), tokenizer)  # type: ignore[arg-type]


def _push(processor: OutputProcessor, tokens: list[int], **event: object) -> Delta:
    delta = processor.push(TokenEvent("r", event.pop("choice", 0), tokens, **event))  # type: ignore[arg-type]
    assert delta is not None
    return delta


def test_text_grows_with_the_tokens(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer)
    pieces = [_push(processor, [i]).text for i in tokenizer.encode("né")]
    last = _push(processor, tokenizer.encode("!"), finish_reason="length")
    assert pieces == ["n", "", "é"]  # é is two tokens: half a character is never shown
    assert last == Delta(0, "!", tokenizer.encode("!"), finish_reason="length")
    assert processor.finished
    output = processor.output
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "text", PROMPT)
    assert output.outputs[0].text == "né!"
    assert output.outputs[0].token_ids == tokenizer.encode("né!")
    assert output.outputs[0].finish_reason == "length"


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer)
    assert _push(processor, tokenizer.encode("é")[:1]).text == ""
    assert _push(processor, tokenizer.encode("é")[:1], finish_reason="length").text == "\ufffd\ufffd"


def test_stop_string_cuts_text_and_tokens(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("lo w",))
    assert _push(processor, tokenizer.encode("hello")).text == "hel"
    delta = _push(processor, tokenizer.encode(" world"))
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.abort) == ("", "stop", "lo w", True)
    assert delta.token_ids == tokenizer.encode(" w")
    assert processor.finished
    assert processor.push(TokenEvent("r", 0, [5])) is None
    assert processor.push(TokenEvent("r", 0, [], finish_reason="length")) is None
    choice = processor.output.outputs[0]
    assert (choice.text, choice.token_ids) == ("hel", tokenizer.encode("hello w"))
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "lo w")


def test_stop_string_in_the_last_token_needs_no_abort(tokenizer: Tokenizer) -> None:
    delta = _push(_processor(tokenizer, stop=("b",)), tokenizer.encode("ab"), finish_reason="length")
    assert (delta.text, delta.finish_reason, delta.stop_reason, delta.abort) == ("a", "stop", "b", False)


def test_stop_string_may_be_included(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("b",), include_stop_str_in_output=True)
    assert _push(processor, tokenizer.encode("abc")).text == "ab"


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "az")])
def test_stop_token_is_counted_and_shown_only_on_request(tokenizer: Tokenizer, include: bool, text: str) -> None:
    (z,) = tokenizer.encode("z")
    processor = _processor(tokenizer, stop_token_ids=(z,), include_stop_str_in_output=include)
    delta = _push(processor, tokenizer.encode("az"), finish_reason="stop", stop_reason=z)
    assert (delta.text, delta.token_ids, delta.stop_reason) == (text, tokenizer.encode("az"), z)


def test_eos_has_no_stop_reason_and_no_text(tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_token_id
    assert eos is not None
    delta = _push(_processor(tokenizer, skip_special_tokens=False), [eos], finish_reason="stop")
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == ("", [eos], "stop", None)


def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, stop=("abc",))
    assert _push(processor, tokenizer.encode("xab")).text == "x"
    assert _push(processor, tokenizer.encode("a"), finish_reason="length").text == "aba"


def test_choices_end_one_by_one(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, n=2, stop=("b",))
    assert _push(processor, tokenizer.encode("b"), choice=1).abort
    assert not processor.finished
    _push(processor, tokenizer.encode("aa"), choice=0, finish_reason="length")
    assert processor.finished
    assert [(c.index, c.text, c.stop_reason) for c in processor.output.outputs] == [(0, "aa", None), (1, "", "b")]


def test_logprobs_name_the_sampled_token_first_and_stop_with_the_tokens(tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode("abc")
    processor = _processor(tokenizer, logprobs=2, stop=("b",))
    entries = [TokenLogprob(-1.0, 3, [c, b], [-0.25, -0.5]), TokenLogprob(-0.5, 2, [c, b], [-0.25, -0.5])]
    delta = _push(processor, [a, b, c], logprobs=[*entries, entries[0]])
    assert delta.logprobs == [
        {a: Logprob(-1.0, 3, "a"), c: Logprob(-0.25, 1, "c"), b: Logprob(-0.5, 2, "b")},
        {b: Logprob(-0.5, 2, "b"), c: Logprob(-0.25, 1, "c")},
    ]
    assert [next(iter(entry)) for entry in delta.logprobs] == [a, b]
    choice = processor.output.outputs[0]
    assert choice.logprobs == delta.logprobs
    assert choice.cumulative_logprob == -1.5


def test_without_logprobs_there_are_none(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer)
    _push(processor, [70], finish_reason="length")
    choice = processor.output.outputs[0]
    assert (choice.logprobs, choice.cumulative_logprob, processor.output.prompt_logprobs) == (None, None, None)


def test_prompt_logprobs_begin_with_none_and_come_with_the_first_delta(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer, prompt_logprobs=1)
    first, second = TokenLogprob(-1.0, 2, [9], [-0.5]), TokenLogprob(-2.0, 1, [3], [-2.0])
    assert processor.push(TokenEvent("r", 0, [], prompt_logprobs=[first])) is None  # the first chunk of the prompt
    delta = _push(processor, [70], prompt_logprobs=[second], num_cached_tokens=2)
    text = tokenizer.token_text
    assert delta.prompt_logprobs == [
        None,
        {2: Logprob(-1.0, 2, text(2)), 9: Logprob(-0.5, 1, text(9))},
        {3: Logprob(-2.0, 1, text(3))},
    ]
    assert delta.num_cached_tokens == processor.output.num_cached_tokens == 2
    later = _push(processor, [70])
    assert (later.prompt_logprobs, later.num_cached_tokens) == (None, None)


def test_errors_are_kept(tokenizer: Tokenizer) -> None:
    processor = _processor(tokenizer)
    delta = _push(processor, [], finish_reason="error", error="the step failed")
    assert (delta.finish_reason, delta.error, delta.abort) == ("error", "the step failed", False)
    assert processor.output.outputs[0].error == "the step failed"


@given(
    text=st.text("ab é", max_size=30), stop=st.text("ab é", min_size=1, max_size=3), cuts=st.lists(st.integers(1, 4))
)
def test_pieces_make_the_text_up_to_the_stop_string(
    tokenizer: Tokenizer, text: str, stop: str, cuts: list[int]
) -> None:
    processor = _processor(tokenizer, stop=(stop,))
    tokens = tokenizer.encode(text)
    pieces = ""
    for size in [*cuts, max(len(tokens), 1)]:
        step, tokens = tokens[:size], tokens[size:]
        reason = None if tokens else "length"
        if (delta := processor.push(TokenEvent("r", 0, step, finish_reason=reason))) is not None:
            pieces += delta.text
    before, found, _ = text.partition(stop)
    choice = processor.output.outputs[0]
    assert pieces == choice.text == before
    assert choice.token_ids == tokenizer.encode(before + found)
    assert choice.finish_reason == ("stop" if found else "length")
