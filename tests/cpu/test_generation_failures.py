"""A step that fails ends its own requests, with provider, layer and shape in the message; the engine goes on."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from octavo.attention.torch_reference import TorchAttention
from octavo.engine.loop import Engine
from octavo.kv_cache.plain import PlainFormat
from octavo.models.layers import Linear
from octavo.ops.torch_reference import TorchOps
from octavo.weights.torch_matmul import TorchMatmul
from tiny_models import GREEDY, Reference, run, start, tokens_of


@pytest.fixture(params=[1, 3])
def engine(llama: Reference, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = start(llama.path, max_steps_in_flight=request.param, attention_backend="torch", ops_backend="torch")
    yield engine
    engine.scheduler.blocks.check()
    engine.shutdown()


def failing(method: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`method`, raising at its n-th call from now."""
    calls = 0

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise RuntimeError("no kernel image for this card")
        return method(self, *args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("cls", "method", "call", "who", "layer"),
    [
        (TorchAttention, "forward", 2, "The attention backend 'torch'", " in layer 1"),
        (TorchAttention, "plan", 1, "The attention backend 'torch'", ""),
        (TorchOps, "silu_and_mul", 1, "The fused op 'torch'", " in layer 0"),
        (PlainFormat, "write", 2, "The kv cache format 'plain'", " in layer 1"),
        (TorchMatmul, "apply", 6, "The matmul 'torch'", " in layer 1"),
        (TorchMatmul, "apply", 9, "The matmul 'torch'", ""),  # the logits
        (Linear, "__call__", 1, "The model", " in layer 0"),
    ],
)
def test_message_names_provider_layer_and_shape(
    monkeypatch: pytest.MonkeyPatch,
    llama: Reference,
    engine: Engine,
    cls: type,
    method: str,
    call: int,
    who: str,
    layer: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cls, method, failing(getattr(cls, method), call))
        answers = run(engine, [llama.prompts[3], llama.prompts[0]])
    batch = "a batch of 8 tokens in 2 requests (1 decoding, longest query 7, padding included)"
    expected = f"{who} failed{layer} on {batch}: RuntimeError: no kernel image for this card"
    assert [(answer.finish_reason, answer.token_ids) for answer in answers] == [("error", [])] * 2
    assert all((answer.error or "").endswith(expected) for answer in answers), answers[0].error
    assert tokens_of(run(engine, llama.prompts)) == llama.tokens


def test_others_are_not_harmed(monkeypatch: pytest.MonkeyPatch, llama: Reference, engine: Engine) -> None:
    """Requests that wait while a step fails are served, and what the failed step wrote is not found as a prefix."""
    monkeypatch.setattr(TorchAttention, "forward", failing(TorchAttention.forward, 1))
    engine.add_request("failing", llama.prompts[-1], params := replace(GREEDY, max_tokens=4))
    reasons = {event.request_id: event.finish_reason for event in engine.step()}
    assert reasons == {"failing": "error"}
    answers = run(engine, llama.prompts[-4:], params)
    assert tokens_of(answers) == [tokens[:4] for tokens in llama.tokens[-4:]]
    assert answers[-1].num_cached <= 48  # what the others of this run share


def test_failure_in_the_middle(monkeypatch: pytest.MonkeyPatch, llama: Reference, engine: Engine) -> None:
    """Tokens that were given before the failure stay given, and are right."""
    patched = failing(TorchAttention.forward, 21)  # the eleventh step of two layers
    monkeypatch.setattr(TorchAttention, "forward", patched)
    answers = run(engine, llama.prompts)
    assert {answer.finish_reason for answer in answers} == {"error"}
    assert tokens_of(answers) == [tokens[:10] for tokens in llama.tokens]
    assert tokens_of(run(engine, llama.prompts)) == llama.tokens


def test_failure_of_the_sampler(monkeypatch: pytest.MonkeyPatch, llama: Reference, engine: Engine) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("octavo.runtime.runner.sample", None)
        (answer,) = run(engine, llama.prompts[:1])
    assert answer.finish_reason == "error"
    assert "The model failed on a batch of 1 tokens in 1 requests" in (answer.error or "")
    assert tokens_of(run(engine, llama.prompts)) == llama.tokens


def test_an_engine_that_is_dropped_is_freed(llama: Reference) -> None:
    """Without a shutdown too: the next one needs the memory."""
    engine = start(llama.path)
    run(engine, llama.prompts[:2])
    model = weakref.ref(engine._executor.runner.model)  # type: ignore[attr-defined]
    assert model() is not None
    del engine
    gc.collect()
    assert model() is None
