"""Persistent, padded buffers for a batch, as the runner keeps them for a CUDA graph, and batches to go through them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from octavo.attention.interface import GraphSupport
from octavo.batch import Batch, BatchShape
from octavo.testing.attention import POISON, AttentionCase

_TENSORS = ("token_ids", "positions", "query_start", "seq_lens", "row_index", "sample_index")


class GraphBuffers:
    """Tensors that hold one case after another, all of one `shape`; block tables are as wide as max_model_len asks.

    Every case must have the shape's tokens and requests, padding included, and the spec of the first one.
    """

    def __init__(self, shape: BatchShape, cases: list[AttentionCase]) -> None:
        first, spec = cases[0], cases[0].spec
        self.shape = shape
        num_blocks = max(len(case.kv.raw) for case in cases)
        raw = first.kv.raw.new_full((num_blocks, first.kv.raw.shape[1]), POISON)
        self.kv = spec.cache_format.view(raw)
        self.tensors: dict[str, Any] = {name: torch.empty_like(getattr(first.batch, name)) for name in _TENSORS}
        width = -(-spec.max_model_len // spec.block_size)
        self.table = first.batch.seq_lens.new_zeros(shape.num_requests, width)
        self.slots = torch.empty_like(first.batch.slots[0])
        self.qkv = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in _qkv(first)]
        self.out = torch.empty(first.q.shape, dtype=spec.dtype, device=first.q.device)

    def load(self, case: AttentionCase) -> Batch:
        """Fill the buffers with a case, poison `out`, and return the case's batch in them."""
        batch, raw = case.batch, case.kv.raw
        self.kv.raw.fill_(POISON)[: len(raw)].copy_(raw)
        for name, tensor in self.tensors.items():
            tensor.copy_(getattr(batch, name))
        (table,), (slots,) = batch.block_tables, batch.slots
        self.table.zero_()[:, : table.shape[1]].copy_(table)
        self.slots.copy_(slots)
        for mine, theirs in zip(self.qkv, _qkv(case), strict=True):
            mine.copy_(theirs)
        self.out.fill_(torch.nan)
        return replace(batch, **self.tensors, shape=self.shape, block_tables=(self.table,), slots=(self.slots,))


def _qkv(case: AttentionCase) -> list[torch.Tensor]:
    return [case.q, *case.new]


def graph_batches(support: GraphSupport) -> tuple[list[tuple[Sequence[tuple[int, int]], dict[str, int]]], BatchShape]:
    """Requests (query_len, seq_len) and paddings of batches of different lengths, and the shape that fits them all."""
    batches: list[tuple[Sequence[tuple[int, int]], dict[str, int]]]
    if support is GraphSupport.DECODE:
        batches = [
            ([(1, m) for m in (20, 33, 64, 100, 7)], {"padding_requests": 3}),
            ([(1, m) for m in (1900, 1, 640, 129, 16, 17, 300)], {"padding_requests": 1}),
            ([(1, m) for m in range(250, 258)], {}),
        ]
        shape = BatchShape(8, 8, 1, 8)
    elif support is GraphSupport.UNIFORM:
        batches = [([(4, m) for m in lens], {}) for lens in ((20, 33, 4), (900, 5, 64), (65, 17, 1300))]
        shape = BatchShape(12, 3, 4, 0)
    else:
        batches = [
            ([(1, 20), (1, 33), (16, 40), (10, 10)], {"padding_requests": 1, "padding_tokens": 4}),
            ([(1, 900), (1, 1), (3, 300), (16, 16), (7, 64)], {"padding_tokens": 4}),
            ([(1, 64), (1, 65), (30, 90)], {"padding_requests": 2}),
        ]
        shape = BatchShape(32, 5, 30, 2)
    return batches, shape
