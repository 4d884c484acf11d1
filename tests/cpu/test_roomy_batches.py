"""Batches padded to the numbers of tokens that a GPU has kernels for: here on a CPU, the tokens stay the same."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from octavo.runtime.buffers import BatchBuffers
from octavo.runtime.sizes import roomy
from octavo.sampling_params import SamplingParams
from tiny_models import make_reference, run, run_choices, start, tokens_of

if TYPE_CHECKING:
    from tiny_models import Reference


@pytest.fixture
def padded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every batch gets room as on a GPU, and some get more than they ask for."""
    seen: set[tuple[int, int]] = set()

    def room(self: BatchBuffers, number: int, most: int) -> int:
        seen.add((number, roomy(number, most)))
        return roomy(number, most)

    monkeypatch.setattr(BatchBuffers, "_room", room)
    yield
    assert any(a < b for a, b in seen)


@pytest.fixture(scope="module", params=["llama", "mistral-window", "qwen2-two-groups"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Reference":
    return make_reference(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 37}, {"max_num_seqs": 3}])
@pytest.mark.usefixtures("padded")
def test_greedy_tokens(tiny: "Reference", options: dict[str, Any]) -> None:
    engine = start(tiny.path, **options)
    assert tokens_of(run(engine, tiny.prompts)) == tiny.tokens
    assert tokens_of(run(engine, tiny.prompts)) == tiny.tokens, "the second time from the prefix cache"
    engine.shutdown()


@pytest.mark.usefixtures("padded")
def test_no_more_tokens_are_sampled_than_a_step_holds(tiny: "Reference", monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step holds fewer tokens than there may be requests, and neither is a number that products are run for."""
    sizes: list[int] = []
    ends = BatchBuffers.ends

    def noted(self: BatchBuffers, *others: Any) -> Any:
        batch = ends(self, *others)
        sizes.append(batch.shape.num_tokens)
        return batch

    monkeypatch.setattr(BatchBuffers, "ends", noted)
    engine = start(tiny.path, max_num_batched_tokens=37, max_num_seqs=64)
    prompts = [*([1 + i] for i in range(34)), *tiny.prompts[:4]]
    assert len(run(engine, prompts)) == len(prompts)
    assert 33 < max(sizes) <= 37
    engine.shutdown()


def test_sampling_forks_and_logprobs(tiny: "Reference", monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0.9, seed=1, n=3, top_k=20, max_tokens=8, logprobs=2, prompt_logprobs=1)
    engine = start(tiny.path)
    expected = run_choices(engine, tiny.prompts[:5], params)
    monkeypatch.setattr(BatchBuffers, "_room", staticmethod(roomy))
    engine.reset_prefix_cache()
    found = run_choices(engine, tiny.prompts[:5], params)
    assert [[c.token_ids for c in cs] for cs in found] == [[c.token_ids for c in cs] for cs in expected]
    ours, theirs = ([one.logprob for one in choices[0].prompt_logprobs] for choices in (found[0], expected[0]))
    assert ours == pytest.approx(theirs, abs=1e-4)
    engine.shutdown()
