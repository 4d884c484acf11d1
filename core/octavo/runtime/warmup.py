"""Before a GPU serves: measure a step's peak, compile what steps can reach, capture graphs."""

from collections.abc import Callable, Iterable, Sequence

import torch

from octavo.attention.interface import GraphSupport
from octavo.batch import BatchShape
from octavo.engine.step import NewRow, SampleRow, SampleRows, ScheduledRow, ScheduledRows, StepInput
from octavo.runtime.assembly import Assembly
from octavo.runtime.graphs import GraphShapes
from octavo.runtime.memory import GRAPH_BYTES, Reserve
from octavo.runtime.rows import PENALTY_BYTES, Row
from octavo.runtime.runner import LOGITS_AT_ONCE, Runner
from octavo.runtime.sampler import sample
from octavo.runtime.sizes import all_sizes, roomy
from octavo.sampling_params import SamplingParams

_SAMPLING = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, logprobs=1),
    SamplingParams(temperature=1.0, seed=0, top_p=0.9, top_k=50, min_p=0.05, presence_penalty=0.5, logprobs=1),
)


def graph_shapes(assembly: Assembly) -> GraphShapes | None:
    """The shapes to capture; None on a CPU, under --enforce-eager, or where a backend cannot."""
    support = min(one.cls.graph_support for one, _ in assembly.attention)
    if assembly.device.type != "cuda" or assembly.config.enforce_eager or support is GraphSupport.NONE:
        return None
    return GraphShapes(support, assembly.limits.max_requests, assembly.limits.max_tokens)


def measure_reserve(runner: Runner, assembly: Assembly) -> Reserve:
    """Run the largest step, with a cache of the null block alone, and take its peak. Compiles what prompts need."""
    limits = assembly.limits
    shape = BatchShape(limits.max_tokens, 1, limits.max_tokens, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    hidden = runner.run_padding(shape)
    _sample_all(runner, hidden[:1].repeat(max(limits.max_requests, LOGITS_AT_ONCE), 1))
    torch.cuda.synchronize()
    activations = torch.cuda.max_memory_allocated() - before
    counts = PENALTY_BYTES * runner.vocab_size * limits.max_requests
    return Reserve(activations + counts, _graph_bytes(runner, assembly, activations))


def _graph_bytes(runner: Runner, assembly: Assembly, activations: int) -> int:
    """What all graphs will take: the largest one's activations, each one's result, and the driver's part."""
    shapes = runner.graphs.shapes.all() if runner.graphs else []
    if not shapes:
        return 0
    model, itemsize = assembly.model, assembly.dtype.itemsize
    decodes = [one.num_tokens for one in shapes if one.num_decodes == one.num_requests]
    results = itemsize * model.hidden_size * sum(one.num_tokens for one in shapes)
    logits = torch.float32.itemsize * model.vocab_size * roomy(max(decodes, default=0))
    largest = activations * shapes[0].num_tokens // assembly.limits.max_tokens
    return largest + results + logits + GRAPH_BYTES * (len(shapes) + len(decodes))


@torch.inference_mode()
def _sample_all(runner: Runner, hidden: torch.Tensor) -> None:
    """Sample every row in each way that there is."""
    for params in _SAMPLING:
        new = NewRow(0, [0], 1, [], params, 0, 0)
        row = Row.start(new, runner.vocab_size, runner.eos_token_ids, hidden.device)
        sample(runner.logits(hidden), [row] * len(hidden), [1] * len(hidden))


@torch.inference_mode()
def _run_products(runner: Runner, assembly: Assembly) -> None:
    """Run a layer of each kind, and the head, for every number of tokens that there will be.

    The largest comes first, so that the others fit into the memory that it leaves.
    """
    limits = assembly.limits
    sizes = {*all_sizes(limits.max_tokens), *all_sizes(min(limits.max_requests, limits.max_tokens))}
    for layer in {layer.kind: layer for layer in runner.model.layers}.values():
        for size in sorted(sizes, reverse=True):
            runner.run_layer(layer, size)
    most, device = max(limits.max_requests, LOGITS_AT_ONCE), assembly.device.torch_device
    hidden = torch.zeros(most, assembly.model.hidden_size, dtype=assembly.dtype, device=device)
    for size in reversed(all_sizes(most)):
        runner.logits(hidden[:size])


def _rehearse(runner: Runner, assembly: Assembly) -> None:
    """A whole step of prompts: what else such a step loads and allocates. Its keys and values go to the null block."""
    limits = assembly.limits
    count = max(1, min(limits.max_requests, limits.max_tokens // 2))
    each = min(limits.max_tokens // count, limits.max_model_len)
    blocks = [[0] * -(-each // assembly.config.block_size)] * len(assembly.groups)
    step = StepInput(
        -1,
        new_rows=[NewRow(row, [0] * each, each, blocks, _SAMPLING[0], 0, 0) for row in range(count)],
        rows=ScheduledRows.of(*(ScheduledRow(row, 0, each) for row in range(count))),
        samples=SampleRows.of(*(SampleRow(row, row, each) for row in range(count))),
    )
    runner.sample(runner.submit(step)).result()
    for row in range(count):
        runner.rows.drop(row)
    if runner.kv_counts is not None:
        runner.kv_counts.zero_()


def warm_up(runner: Runner, assembly: Assembly, show: Callable[[Sequence[BatchShape]], Iterable[BatchShape]]) -> int:
    """Compile what steps can reach and capture the graphs, `show`n as they go; bytes that the graphs took."""
    limits = assembly.limits
    shapes = runner.graphs.shapes.all() if runner.graphs else []
    eager = [BatchShape(limits.max_tokens, 1, limits.max_tokens, 0), BatchShape(1, 1, 1, 1)]
    if min(limits.max_requests, limits.max_tokens) > 1:
        eager.append(BatchShape(limits.max_tokens, 2, limits.max_tokens - 1, 1))
    for backend in runner.backends:
        backend.warmup([*eager, *shapes])
    _run_products(runner, assembly)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    for shape in show(shapes):
        runner.capture(shape)
    torch.cuda.synchronize()
    taken = free - torch.cuda.mem_get_info()[0]
    _rehearse(runner, assembly)  # last, since captures let go of what torch keeps for later
    return taken
