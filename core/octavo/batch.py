"""The batch: what one step computes, as device tensors with host copies of the lengths (docs/design.md §3)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """Padded upper bounds of a batch, and the key of its CUDA graph."""

    num_tokens: int
    num_requests: int
    max_query_len: int
    num_decodes: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's batch. Requests that compute one token come first (`shape.num_decodes` of them).

    token_ids, positions [T] int32; query_start [R+1] int32; seq_lens [R] int32 (length after this step, 0 for padding);
    row_index [R] int32; block_tables[g] [R, B] int32 (0 = the null block); slots[g] [T] int64 (-1 = write nothing);
    sample_index [S] int32, padded on a GPU. `query_start_host` and `seq_lens_host` are host copies of the lengths.
    """

    shape: BatchShape
    token_ids: torch.Tensor
    positions: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    row_index: torch.Tensor
    block_tables: tuple[torch.Tensor, ...]
    slots: tuple[torch.Tensor, ...]
    sample_index: torch.Tensor
    query_start_host: list[int]
    seq_lens_host: list[int]
