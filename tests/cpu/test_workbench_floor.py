"""The floor of a workload: ideal steps by hand, and the figures that were published for one card."""

import pytest
from octavo.models.config import read_decoder_config
from octavo.testing.ceilings import Ceilings
from octavo_workbench.floor import IdealStep, ModelCost, floor_of, ideal_steps, model_cost
from octavo_workbench.workloads import LLAMA_8B, TINY, Job, workload

H200 = Ceilings(4.29e12, 795e12, "bfloat16")


def test_ideal_steps_by_hand() -> None:
    """Prompts of 5 and 3 tokens, budget 4: chunks, a prompt beside a decode, an end."""
    steps = list(ideal_steps([Job([1] * 5, 3), Job([1] * 3, 1)], 4))
    assert steps == [
        IdealStep(4, 0, 4, 1 + 2 + 3 + 4),
        IdealStep(4, 2, 5 + 3, 5 + (1 + 2 + 3)),
        IdealStep(1, 1, 6, 6),
        IdealStep(1, 1, 7, 7),
    ]


def test_every_token_is_computed_once() -> None:
    jobs = workload("7x50x9")
    steps = list(ideal_steps(jobs, 64))
    assert sum(step.num_samples for step in steps) == 7 * 9
    assert sum(step.num_tokens for step in steps) == 7 * (50 + 8)
    assert sum(step.num_pairs for step in steps) == 7 * 58 * 59 // 2
    assert max(step.num_tokens for step in steps) <= 64


def test_the_floor_by_hand() -> None:
    """One step is bound by its operations, the next by the weights."""
    cost = ModelCost(weight_bytes=100, token_flops=10, logits_flops=5, pair_flops=1, kv_bytes_per_token=2.0)
    floor = floor_of([Job([1] * 20, 2)], cost, Ceilings(10.0, 20.0, "bfloat16"))
    first, second = (20 * 10 + 5 + 210) / 20, 100 / 10
    assert floor.seconds == pytest.approx(first + second + (20 + 21) * 2 / 10)
    assert (floor.num_steps, floor.num_bytes, floor.num_flops) == (2, 200 + 82, 415 + 10 + 5 + 21)


@pytest.mark.parametrize(
    ("name", "tokens_per_s"),
    [
        ("sharegpt512", 13_840),
        ("decode_b1", 286),
        ("decode_b32", 6_100),
        ("decode_b256", 13_560),
        ("prefill_8k", 49_000),
    ],
)
def test_floors_of_llama_8b_on_one_card(name: str, tokens_per_s: int) -> None:
    """The figures of the project's targets for this card, within 1.5%: their steps are cut a little otherwise."""
    cost = model_cost(read_decoder_config(LLAMA_8B), 2 * 8_030_261_248, 131_072, 2)
    jobs = workload(name)
    count = sum(job.num_output_tokens + (len(job.prompt_token_ids) if name == "prefill_8k" else 0) for job in jobs)
    assert count / floor_of(jobs, cost, H200).seconds == pytest.approx(tokens_per_s, rel=0.015)


def test_a_tied_embedding_is_read_for_the_logits() -> None:
    tied = read_decoder_config(TINY)
    assert tied.tie_embeddings
    assert model_cost(tied, 1000, 1.0, 2).weight_bytes == 1000
    assert model_cost(read_decoder_config(LLAMA_8B), 10**10, 1.0, 2).weight_bytes == 10**10 - 2 * 4096 * 128_256
