"""Timing for the tune command: batches on the GPU, CUDA graphs over caches that rotate out of the L2, runs in turns."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from octavo.attention.interface import AttentionSpec
from octavo.batch import Batch, BatchShape
from octavo.kv_cache.interface import KVCache
from octavo.testing.ceilings import seconds_of

from octavo_attention_triton.backend import TritonAttention
from octavo_attention_triton.options import TritonAttentionOptions

COLD_BYTES = 256 << 20  # that rotating caches hold together: several times the L2 of any GPU
_BYTES_PER_GRAPH = 2 << 30  # of keys and values, so that a graph runs well past its launch


@dataclass(frozen=True, slots=True)
class Workload:
    """`count` requests of `query_len` tokens each, with `seq_len` tokens in the cache."""

    name: str
    count: int
    query_len: int
    seq_len: int

    def kv_bytes(self, spec: AttentionSpec) -> int:
        """Bytes of the keys and values that are read at least once."""
        return 2 * self.count * self.seq_len * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize

    def flops(self, spec: AttentionSpec) -> int:
        """Operations of both products over the keys that causal queries see."""
        n, cached = self.query_len, self.seq_len - self.query_len
        return 4 * self.count * spec.num_heads * spec.head_dim * (n * cached + n * (n + 1) // 2)

    @property
    def is_decode(self) -> bool:
        """Whether the decode kernel alone serves it."""
        return self.query_len == 1


@dataclass(frozen=True, slots=True)
class Inputs:
    """A workload's batch with as many caches as it takes to be cold."""

    batch: Batch
    caches: list[KVCache]
    q: torch.Tensor
    new: tuple[torch.Tensor, torch.Tensor]
    out: torch.Tensor
    calls: int


def make_inputs(work: Workload, spec: AttentionSpec, cold_bytes: int = COLD_BYTES) -> Inputs:
    """Random queries, keys and values, in blocks of random order; caches of `cold_bytes` together at least.

    The queries' own keys and values are a view beside the queries, as in a model, and written to every cache.
    """
    device, size = spec.device.torch_device, spec.block_size
    blocks_each = -(-work.seq_len // size)
    num_blocks = work.count * blocks_each + 1
    num_caches = max(1, math.ceil(cold_bytes / work.kv_bytes(spec)))
    table = (torch.randperm(num_blocks - 1, device=device) + 1).int().view(work.count, blocks_each)
    num_tokens = work.count * work.query_len
    starts = torch.arange(work.count + 1, dtype=torch.int32, device=device) * work.query_len
    nothing = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    batch = Batch(
        BatchShape(num_tokens, work.count, work.query_len, work.count if work.is_decode else 0),
        nothing,
        nothing,
        starts,
        torch.full((work.count,), work.seq_len, dtype=torch.int32, device=device),
        nothing[: work.count],
        (table,),
        (nothing.long(),),
        starts[1:] - 1,
        starts.tolist(),
        [work.seq_len] * work.count,
    )
    caches = [_random_cache(spec, num_blocks) for _ in range(num_caches)]
    heads, kv_heads = spec.num_heads, spec.num_kv_heads
    qkv = torch.randn(num_tokens, heads + 2 * kv_heads, spec.head_dim, dtype=spec.dtype, device=device)
    q, k, v = torch.split_with_sizes(qkv, [heads, kv_heads, kv_heads], dim=1)
    places = torch.arange(work.seq_len - work.query_len, work.seq_len, device=device)
    slots = table[:, places // size].long() * size + places % size
    for cache in caches:
        spec.cache_format.write(cache, k, v, slots.view(-1))
    rounds = max(1, _BYTES_PER_GRAPH // (work.kv_bytes(spec) * num_caches)) if work.is_decode else 1
    out = torch.empty(q.shape, dtype=spec.dtype, device=device)
    return Inputs(batch, caches, q, (k, v), out, num_caches * rounds)


def _random_cache(spec: AttentionSpec, num_blocks: int) -> KVCache:
    raw = torch.empty(num_blocks, spec.cache_format.page_bytes(), dtype=torch.uint8, device=spec.device.torch_device)
    kv = spec.cache_format.view(raw)
    kv.k.normal_()
    kv.v.normal_()
    return kv


def build(cls: type[TritonAttention], spec: AttentionSpec, options: TritonAttentionOptions) -> TritonAttention:
    """The backend with a scratch of its own."""
    size = cls.scratch_bytes(spec, options)
    return cls(spec, options, torch.empty(size, dtype=torch.uint8, device=spec.device.torch_device))


def capture(backend: TritonAttention, inputs: Inputs) -> torch.cuda.CUDAGraph:
    """A graph of `inputs.calls` forwards, one cache after another. The units and tiles stay planned."""
    plan = backend.plan(inputs.batch)
    backend.forward(plan, inputs.q, inputs.caches[0], inputs.out, new=inputs.new)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inputs.calls):
            backend.forward(plan, inputs.q, inputs.caches[i % len(inputs.caches)], inputs.out, new=inputs.new)
    return graph


def time_interleaved(works: Sequence[Callable[[], object]], rounds: int = 9) -> list[float]:
    """Median microseconds of each piece of work, run in turns so that a drifting clock meets all alike."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + 1):
        for mine, work in zip(times, works, strict=True):
            seconds = seconds_of("cuda", work)
            if turn:
                mine.append(seconds * 1e6)
    return [median(mine) for mine in times]
