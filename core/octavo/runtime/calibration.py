"""How large keys and values get: the model runs on a few prompts with a plain cache, which is then read back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend
from octavo.attention.torch_reference import TorchAttention
from octavo.engine.step import NewRow, ScheduledRow, ScheduledRows, StepInput
from octavo.kv_cache.interface import KVCacheFormat, KVSpec
from octavo.kv_cache.plain import PlainFormat
from octavo.models.decoder import Decoder
from octavo.models.layers import AttentionLayer
from octavo.runtime.assembly import Assembly
from octavo.runtime.buffers import BatchBuffers
from octavo.runtime.memory import allocate_pages
from octavo.runtime.runner import Runner
from octavo.sampling_params import SamplingParams


def largest_values(
    assembly: Assembly,
    model: Decoder,
    layers: Sequence[AttentionLayer],
    buffers: BatchBuffers,
    prompts: Sequence[list[int]],
) -> torch.Tensor:
    """The largest magnitudes [L, 2, Hk] float32 of the keys and values of `prompts`, in each layer and head.

    `layers` are the model's. Prompts run one by one, each from its first token on. Raises StepError.
    """
    shape, size, groups = assembly.model, assembly.config.block_size, assembly.layer_groups
    plain = PlainFormat(KVSpec(shape.num_kv_heads, shape.head_dim, size, assembly.dtype))
    specs = [replace(spec, kv_layout=plain.layout, cache_format=plain) for _, spec in assembly.attention]
    backends: list[AttentionBackend] = [TorchAttention(spec, None, torch.empty(0)) for spec in specs]
    num_blocks = -(-max(map(len, prompts)) // size)
    blocks = [list(range(1 + i * num_blocks, 1 + (i + 1) * num_blocks)) for i in range(len(backends))]
    pages = allocate_pages(plain, groups, 1 + len(backends) * num_blocks, buffers.device)
    caches = tuple(map(plain.view, pages))
    names: dict[type, Any] = {TorchAttention: "The attention backend 'torch', calibrating,"}
    runner = Runner(model, backends, caches, groups, buffers, shape.vocab_size, frozenset(), names)
    largest = torch.zeros(len(caches), 2, shape.num_kv_heads, device=buffers.device)
    places = [torch.tensor(blocks[group], device=buffers.device) for group in groups]
    with _attending_by(layers, backends, plain):
        for prompt in prompts:
            new = NewRow(0, prompt, len(prompt), blocks, SamplingParams(temperature=0.0), 0, 0)
            _submit(runner, new, assembly.limits.max_tokens)
            for one, cache, place in zip(largest, caches, places, strict=True):
                found = torch.stack(plain.read(cache, place, len(prompt))).abs().amax((1, 3))
                torch.maximum(one, found, out=one)
    return largest


def _submit(runner: Runner, new: NewRow, most: int) -> None:
    """Compute a prompt from its first token on, in steps of at most `most` tokens."""
    length = len(new.token_ids)
    for start in range(0, length, most):
        rows = ScheduledRows.of(ScheduledRow(new.row, start, min(most, length - start)))
        first = start == 0
        runner.submit(StepInput(0, [new.row] if first else [], [new] if first else [], rows=rows))


@contextmanager
def _attending_by(
    layers: Sequence[AttentionLayer], backends: Sequence[AttentionBackend], cache_format: KVCacheFormat
) -> Iterator[None]:
    """The layers attend by others' backends and format for a while."""
    before = [(layer, layer.backend, layer.cache_format) for layer in layers]
    for layer in layers:
        layer.backend, layer.cache_format = backends[layer.group], cache_format
    try:
        yield
    finally:
        for layer, backend, own_format in before:
            layer.backend, layer.cache_format = backend, own_format
