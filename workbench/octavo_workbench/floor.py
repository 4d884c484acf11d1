"""The least time that a workload can take on a device: what its steps must read and compute, at the ceilings.

Sum over steps of max(weight bytes / bandwidth, operations / rate) + KV bytes / bandwidth. Weights are read once a step,
the embedding not, the logits' matrix yes. The steps are those of an engine that starts all requests at once, runs the
running ones first and fills each step with prompts up to STEP_TOKENS.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octavo.models.config import DecoderConfig
from octavo.testing.ceilings import Ceilings

from octavo_workbench.workloads import Job

STEP_TOKENS = 8192
"""The token budget of the ideal steps, whatever the engine's own is: a floor is the workload's and the device's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What a model reads and computes: bytes of weights a step, operations a token, a sampled token, a query and key.

    `pair_flops` counts one query and one key it sees over all layers, where every layer sees all keys.
    """

    weight_bytes: float
    token_flops: int
    logits_flops: int
    pair_flops: int
    kv_bytes_per_token: float


def model_cost(model: DecoderConfig, weight_bytes: int, kv_bytes_per_token: float, itemsize: int) -> ModelCost:
    """The cost of a dense decoder whose checkpoint takes `weight_bytes`, its embedding `itemsize` bytes a number."""
    hidden, heads = model.hidden_size, (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_layer = hidden * (heads + 3 * model.intermediate_size)
    embedding = 0 if model.tie_embeddings else model.vocab_size * hidden * itemsize
    return ModelCost(
        weight_bytes=weight_bytes - embedding,
        token_flops=2 * model.num_layers * per_layer,
        logits_flops=2 * hidden * model.vocab_size,
        pair_flops=4 * model.num_layers * model.num_heads * model.head_dim,
        kv_bytes_per_token=kv_bytes_per_token,
    )


@dataclass(frozen=True, slots=True)
class IdealStep:
    """A step's tokens, sampled tokens, keys and values that it reads, and pairs of a query and a key it sees."""

    num_tokens: int
    num_samples: int
    num_keys: int
    num_pairs: int


def ideal_steps(jobs: Sequence[Job], max_tokens: int = STEP_TOKENS) -> Iterator[IdealStep]:
    """The steps of a workload, of at most `max_tokens` tokens each."""
    waiting = [(len(job.prompt_token_ids), job.num_output_tokens) for job in reversed(jobs)]
    running: list[list[int]] = []  # tokens computed, of the prompt, wanted in the end
    while waiting or running:
        budget, step = max_tokens, [0, 0, 0, 0]
        for one in running:
            budget -= _advance(one, budget, step)
        while waiting and budget > 0:
            prompt, output = waiting.pop()
            running.append([0, prompt, prompt + output - 1])
            budget -= _advance(running[-1], budget, step)
        running = [one for one in running if one[0] < one[2]]
        yield IdealStep(*step)


def _advance(one: list[int], budget: int, step: list[int]) -> int:
    """Compute a request's share of a step, and count it; the tokens that it took."""
    computed, prompt, _ = one
    count = min(budget, max(1, prompt - computed))
    if count <= 0:
        return 0
    end = computed + count
    one[0] = end
    step[0] += count
    step[1] += end >= prompt
    step[2] += end
    step[3] += count * computed + count * (count + 1) // 2
    return count


@dataclass(frozen=True, slots=True)
class Floor:
    """The least seconds of a workload, and the bytes and operations that its ideal steps ask for."""

    seconds: float
    num_bytes: float
    num_flops: float
    num_steps: int


def floor_of(jobs: Sequence[Job], cost: ModelCost, ceilings: Ceilings) -> Floor:
    """The workload's floor under the ceilings."""
    seconds = num_bytes = num_flops = 0.0
    num_steps = 0
    for step in ideal_steps(jobs):
        flops = cost.token_flops * step.num_tokens + cost.logits_flops * step.num_samples
        flops += cost.pair_flops * step.num_pairs
        kv_bytes = cost.kv_bytes_per_token * step.num_keys
        seconds += max(cost.weight_bytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s)
        seconds += kv_bytes / ceilings.bytes_per_s
        num_bytes += cost.weight_bytes + kv_bytes
        num_flops += flops
        num_steps += 1
    return Floor(seconds, num_bytes, num_flops, num_steps)
