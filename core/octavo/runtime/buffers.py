"""The runner's persistent buffers, and the way from a StepInput to a Batch."""

import numpy as np
import numpy.typing as npt
import torch

from octavo.batch import Batch, BatchShape
from octavo.engine.step import StepInput
from octavo.runtime.rows import Row

Ints = npt.NDArray[np.int32]


class BatchBuffers:
    """Device tensors that every batch reuses, and the block tables of every row.

    `last_token[row]` is the token that the device sampled for the row last: the next step's input, unseen by the host.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        max_blocks: int,
        block_size: int,
        num_groups: int,
        device: torch.device,
    ) -> None:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.block_size = block_size
        self.device = device
        self.tables_host = [np.zeros((max_requests, max_blocks), dtype=np.int32) for _ in range(num_groups)]
        self.tables = [ints(max_requests, max_blocks) for _ in range(num_groups)]
        self.last_token = ints(max_requests)
        self.token_ids, self.positions = ints(max_tokens), ints(max_tokens)
        self.slots = [torch.zeros(max_tokens, dtype=torch.int64, device=device) for _ in range(num_groups)]
        self.query_start, self.seq_lens, self.row_index = ints(max_requests + 1), ints(max_requests), ints(max_requests)

    def set_table(self, group: int, row: int, start: int, blocks: list[int]) -> None:
        """Entries of a row's table from `start` on."""
        values = np.array(blocks, dtype=np.int32)
        self.tables_host[group][row, start : start + len(blocks)] = values
        self.tables[group][row, start : start + len(blocks)] = torch.from_numpy(values).to(self.device)

    def fork(self, source: int, row: int) -> None:
        """Row `row` takes over the tables and the last token of `source`."""
        for host, table in zip(self.tables_host, self.tables, strict=True):
            host[row] = host[source]
            table[row] = table[source]
        self.last_token[row] = self.last_token[source]

    def prepare(self, step: StepInput, rows: dict[int, Row]) -> Batch:
        """The batch of a step."""
        counts = np.array([r.num_tokens for r in step.rows], dtype=np.int32)
        starts = np.array([r.start for r in step.rows], dtype=np.int32)
        index = np.array([r.row for r in step.rows], dtype=np.int32)
        query_start = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_tokens = int(query_start[-1])
        positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - query_start[:-1], counts)
        seq_lens = starts + counts
        self._fill_tokens(step, rows, query_start)
        shape = BatchShape(num_tokens, len(counts), int(counts.max()), int((counts == 1).sum()))
        row_index = self._put(self.row_index, index)
        width = -(-int(seq_lens.max()) // self.block_size)
        return Batch(
            shape,
            self.token_ids[:num_tokens],
            self._put(self.positions, positions),
            self._put(self.query_start, query_start),
            self._put(self.seq_lens, seq_lens),
            row_index,
            tuple(table[:, :width].index_select(0, row_index) for table in self.tables),
            tuple(self._put_slots(g, positions, np.repeat(index, counts)) for g in range(len(self.tables))),
            self._sample_index(step, index, query_start),
            query_start.tolist(),
            seq_lens.tolist(),
        )

    def _put(self, buffer: torch.Tensor, values: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> torch.Tensor:
        """Copy host values into the head of a persistent buffer."""
        head = buffer[: len(values)]
        head.copy_(torch.from_numpy(values), non_blocking=True)
        return head

    def _put_slots(self, group: int, positions: Ints, index: Ints) -> torch.Tensor:
        blocks = self.tables_host[group][index, positions // self.block_size].astype(np.int64)
        return self._put(self.slots[group], blocks * self.block_size + positions % self.block_size)

    def _fill_tokens(self, step: StepInput, rows: dict[int, Row], query_start: Ints) -> None:
        """Known tokens from the host, the others from `last_token`."""
        tokens = np.zeros(int(query_start[-1]), dtype=np.int32)
        targets: list[int] = []
        sources: list[int] = []
        for scheduled, begin in zip(step.rows, query_start[:-1].tolist(), strict=True):
            end = scheduled.start + scheduled.num_tokens
            known = rows[scheduled.row].token_ids
            if scheduled.start < len(known):
                part = known[scheduled.start : end]
                tokens[begin : begin + len(part)] = part
            if end > len(known):
                targets.append(begin + scheduled.num_tokens - 1)
                sources.append(scheduled.row)
        self._put(self.token_ids, tokens)
        if targets:
            where = torch.tensor(targets, device=self.device)
            self.token_ids[where] = self.last_token[torch.tensor(sources, device=self.device)]

    def _sample_index(self, step: StepInput, index: Ints, query_start: Ints) -> torch.Tensor:
        """The token whose logits each sample takes: the last of its source's part of the batch."""
        last = dict(zip(index.tolist(), (query_start[1:] - 1).tolist(), strict=True))
        wanted = [last[sample.source] for sample in step.samples]
        return torch.tensor(wanted, dtype=torch.int32, device=self.device)
