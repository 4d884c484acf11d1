"""Persistent, padded buffers for a batch, as the runner keeps them for a CUDA graph."""

from dataclasses import replace
from typing import Any

import torch

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
