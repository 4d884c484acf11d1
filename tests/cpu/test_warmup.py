"""What a GPU runs before it serves leaves no trace: here on a CPU, where the same code can be called."""

from pathlib import Path
from typing import Any

import pytest
from octavo.runtime import worker
from octavo.runtime.assembly import Assembly
from octavo.runtime.warmup import _rehearse, _run_products
from tiny_models import make_reference, run, start, tokens_of


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("qwen2-two-groups", {}), ("llama", {"max_num_seqs": 1}), ("llama", {"kv_cache_dtype": "int8"})],
)
def test_tokens_after_it_are_those_without_it(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemblies: list[Assembly] = []
    make_runner = worker._runner

    def remember(assembly: Assembly, *others: Any) -> Any:
        assemblies.append(assembly)
        return make_runner(assembly, *others)

    monkeypatch.setattr(worker, "_runner", remember)
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
