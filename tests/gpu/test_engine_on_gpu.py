"""The engine on a GPU: the CPU reference's tokens in float32, whatever graphs, chunks and neighbours there are."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from octavo.engine.loop import Engine
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tiny_models import Reference

USUAL: dict[str, Any] = {"device": "cuda", "num_gpu_blocks_override": 600}


@contextmanager
def started(reference: "Reference", **options: Any) -> Iterator[Engine]:
    from tiny_models import start

    engine = start(reference.path, **USUAL | options)
    yield engine
    engine.shutdown()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"max_num_batched_tokens": 40},
        {"max_steps_in_flight": 1},
        {"num_gpu_blocks_override": 40, "enable_prefix_caching": False},
        {"attention_backend": "torch", "ops_backend": "torch", "linear_backend": "torch"},
    ],
    ids=["graphs", "eager", "chunks", "one-step-in-flight", "preemption", "references"],
)
def test_greedy_tokens_are_those_of_transformers(tiny: "Reference", options: dict[str, Any]) -> None:
    from tiny_models import run, tokens_of

    with started(tiny, **options) as engine:
        assert tokens_of(run(engine, tiny.prompts)) == tiny.tokens
        assert tokens_of(run(engine, tiny.prompts)) == tiny.tokens, "the second time from the prefix cache"
        alone = [tokens_of(run(engine, [prompt]))[0] for prompt in tiny.prompts[:4]]
        assert alone == tiny.tokens[:4]


SAMPLED = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=2, top_p=0.8, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=1.3, seed=3, top_k=20, min_p=0.02, max_tokens=24, ignore_eos=True, n=3),
    SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, max_tokens=24),
    SamplingParams(temperature=0.0, logit_bias={7: 100.0}, max_tokens=5),
    SamplingParams(temperature=0.0, allowed_token_ids=(3, 4, 9), max_tokens=8),
    SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, max_tokens=8),
]


@pytest.mark.parametrize("params", SAMPLED, ids=range(len(SAMPLED)))
def test_sampling_gives_the_tokens_of_a_cpu(llama: "Reference", params: SamplingParams) -> None:
    from tiny_models import run_choices

    prompts = llama.prompts[:6]
    with started(llama, device="cpu") as engine:
        expected = run_choices(engine, prompts, params)
    with started(llama) as engine:
        found = run_choices(engine, prompts, params)
    assert [[c.token_ids for c in choices] for choices in found] == [[c.token_ids for c in cs] for cs in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.rank for one in ours[0].logprobs] == [one.rank for one in theirs[0].logprobs]
        for name in ("logprobs", "prompt_logprobs"):
            mine, others = ([one.logprob for one in getattr(choices[0], name)] for choices in (ours, theirs))
            assert mine == pytest.approx(others, abs=1e-3)


def submit_only(engine: Engine, steps: int) -> None:
    """Steps whose outputs are fetched with the check for synchronising calls off: the steady state waits there only."""
    executor: Any = engine._executor
    submit, sample = executor.submit, executor.sample

    def checked(function: Any) -> Any:
        def call(*args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    executor.submit, executor.sample = checked(submit), checked(sample)
    try:
        for _ in range(steps):
            engine.step()
    finally:
        executor.submit, executor.sample = submit, sample


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
def test_no_step_waits_for_the_device(llama: "Reference", temperature: float, options: dict[str, Any]) -> None:
    params = SamplingParams(
        temperature=temperature, top_p=0.9, top_k=30, presence_penalty=0.1, logprobs=1, max_tokens=40, ignore_eos=True
    )
    with started(llama, **options) as engine:
        for i, prompt in enumerate(llama.prompts):
            engine.add_request(str(i), prompt, params)
        submit_only(engine, 30)
        assert engine.has_work()


def test_long_steps_are_submitted_while_the_device_is_busy() -> None:
    """Kernels that libraries load when they first choose them would wait for it: the start has loaded them all."""
    from octavo_workbench.workloads import SHAPES, model_of_shape
    from tiny_models import start

    options = {"dtype": "bfloat16", "load_format": "dummy", "max_model_len": 2048, "max_num_seqs": 256}
    options |= {"max_num_batched_tokens": 8192, "num_gpu_blocks_override": 2000, "enable_prefix_caching": False}
    seconds = []
    with model_of_shape(SHAPES["llama-8b"] | {"num_hidden_layers": 2}) as folder:
        engine = start(Path(folder), **USUAL | options)
        for count, length in ((11, 100), (90, 19), (37, 78), (171, 25), (3, 2033)):
            for i in range(count):
                engine.add_request(f"{count} {i}", [1 + i] * length, SamplingParams(temperature=0.0, max_tokens=3))
            step = engine.scheduler.schedule()
            assert step is not None and step.num_tokens == count * length > 1024 and len(step.samples) == count
            torch.cuda._sleep(int(1e9))  # type: ignore[no-untyped-call]  # clock cycles: about half a second
            begin = time.perf_counter()
            pending = engine._executor.sample(engine._executor.submit(step))
            seconds.append(time.perf_counter() - begin)
            engine.scheduler.update(pending.result())
            assert time.perf_counter() - begin > 0.3
            for i in range(count):
                engine.abort(f"{count} {i}")
        engine.shutdown()
    assert max(seconds) < 0.15, seconds


def test_nothing_is_compiled_after_the_start(llama: "Reference") -> None:
    """Over 500 steps of random shapes: prompts of any length, any number of requests, cache hits and forks."""
    from octavo.runtime.compilations import count_compilations

    generator = random.Random(0)
    with started(llama, num_gpu_blocks_override=2000) as engine:
        with count_compilations() as compiled:
            for number in range(500):
                for i in range(generator.choice([0, 0, 1, 2, 5])):
                    prompt = [generator.randrange(1, 500) for _ in range(generator.randrange(1, 150))]
                    params = SamplingParams(
                        temperature=generator.choice([0.0, 0.8]),
                        top_p=generator.choice([1.0, 0.9]),
                        n=generator.choice([1, 1, 3]),
                        max_tokens=generator.randrange(1, 30),
                    )
                    engine.add_request(f"{number}-{i}", prompt, params)
                engine.step()
            while engine.has_work():
                engine.step()
        assert compiled.names == []


def test_graphs_serve_most_steps(llama: "Reference") -> None:
    from tiny_models import run

    with started(llama) as engine:
        runner: Any = engine._executor.runner  # type: ignore[attr-defined]
        replayed: list[Any] = []
        replay = runner.graphs.replay
        runner.graphs.replay = lambda shape: (replayed.append(shape), replay(shape))[1]
        before = engine.stats().num_steps
        run(engine, llama.prompts)
        assert len(replayed) == engine.stats().num_steps - before
