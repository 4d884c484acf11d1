"""What a GPU runs before it serves leaves no trace: here on a CPU, where the same code can be called."""

from pathlib import Path
from typing import Any

import pytest
from octavo.batch import BatchShape
from octavo.runtime import worker
from octavo.runtime.assembly import Assembly
from octavo.runtime.sizes import roomy
from octavo.runtime.warmup import _rehearse, _run_products
from tiny_models import make_reference, run, start, tokens_of


@pytest.fixture
def assemblies(monkeypatch: pytest.MonkeyPatch) -> list[Assembly]:
    """What engines that start meanwhile are assembled of."""
    found: list[Assembly] = []
    make_runner = worker._runner

    def remember(assembly: Assembly, *others: Any) -> Any:
        found.append(assembly)
        return make_runner(assembly, *others)

    monkeypatch.setattr(worker, "_runner", remember)
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("qwen2-two-groups", {}), ("llama", {"max_num_seqs": 1}), ("llama", {"kv_cache_dtype": "int8"})],
)
def test_tokens_after_it_are_those_without_it(
    name: str, options: dict[str, Any], tmp_path: Path, assemblies: list[Assembly]
) -> None:
    reference = make_reference(name, tmp_path)
    engine = start(reference.path, **options)
    expected = tokens_of(run(engine, reference.prompts))
    engine.reset_prefix_cache()
    runner: Any = engine._executor.runner  # type: ignore[attr-defined]
    _run_products(runner, assemblies[-1])
    _rehearse(runner, assemblies[-1])
    assert runner.kv_counts is None or not runner.kv_counts.any()
    assert tokens_of(run(engine, reference.prompts)) == expected
    assert options or expected == reference.tokens
    engine.shutdown()


def test_products_are_run_for_every_number_of_tokens_that_batches_get(
    tmp_path: Path, assemblies: list[Assembly], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest first, and for limits that are no such numbers by themselves."""
    engine = start(make_reference("llama", tmp_path).path, max_num_seqs=30, max_num_batched_tokens=700)
    runner: Any = engine._executor.runner  # type: ignore[attr-defined]
    layers: list[int] = []
    heads: list[int] = []
    monkeypatch.setattr(runner, "run_layer", lambda layer, number: layers.append(number))
    monkeypatch.setattr(runner, "logits", lambda hidden: heads.append(len(hidden)))
    _run_products(runner, assemblies[-1])
    assert layers == sorted(layers, reverse=True) and heads == sorted(heads, reverse=True)
    buffers = runner.buffers
    monkeypatch.setattr(buffers, "_room", roomy)
    decodes = {buffers._roomy(BatchShape(number, number, 1, number)).num_tokens for number in range(1, 31)}
    prompts = {buffers._roomy(BatchShape(number, 1, number, 0)).num_tokens for number in range(2, 701)}
    assert decodes | prompts <= set(layers)
    assert {roomy(number) for number in range(1, 31)} <= set(heads), "logits make room themselves"
    assert 30 in decodes and 700 in prompts
    engine.shutdown()
