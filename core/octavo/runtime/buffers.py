"""The runner's persistent buffers, and the way from a StepInput to a Batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.batch import Batch, BatchShape
from octavo.engine.step import ScheduledRow, StepInput
from octavo.runtime.rows import Row
from octavo.runtime.transfer import Array, Packet, padded_bytes, to_device

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step's batch, and the rows [S] int64 whose tokens it samples."""

    batch: Batch
    sample_rows: torch.Tensor


class BatchBuffers:
    """Device tensors that every batch reuses, and the block tables of every row.

    `last_token[row]` is the token that the device sampled for the row last: the next step's input, unseen by the host.
    Tables and tokens have one row more than there are requests: padding's, whose blocks are the null block.
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
        self.padding_row = max_requests
        self.tables_host = [np.zeros((max_requests + 1, max_blocks), dtype=np.int32) for _ in range(num_groups)]
        self.tables = [ints(max_requests + 1, max_blocks) for _ in range(num_groups)]
        self.last_token = ints(max_requests + 1)
        self._gathered = [ints(max_requests, max_blocks) for _ in range(num_groups)]
        self._edits: list[list[Longs]] = [[] for _ in range(num_groups)]
        self._packet = Packet(_packet_bytes(max_requests, max_tokens, num_groups), device)

    def set_table(self, group: int, row: int, start: int, blocks: list[int]) -> None:
        """Entries of a row's table from `start` on; the device learns of them with the next batch."""
        self.tables_host[group][row, start : start + len(blocks)] = blocks
        self._note_edit(group, row, start, start + len(blocks))

    def fork(self, source: int, row: int) -> None:
        """Row `row` takes over the tables and the last token of `source`."""
        for group, table in enumerate(self.tables_host):
            table[row] = table[source]
            self._note_edit(group, row, 0, int(table[row].nonzero()[0].max(initial=-1)) + 1)
        self.last_token[row] = self.last_token[source]

    def _note_edit(self, group: int, row: int, start: int, stop: int) -> None:
        first = row * self.tables_host[group].shape[1]
        self._edits[group].append(np.arange(first + start, first + stop))

    def _send_edits(self) -> None:
        """Bring the device's tables up to the host's."""
        for edits, host, table in zip(self._edits, self.tables_host, self.tables, strict=True):
            if edits:
                places = np.concatenate(edits)
                both = to_device(np.stack((places, host.reshape(-1)[places])), self.device)
                table.view(-1).index_copy_(0, both[0], both[1].int())
                edits.clear()

    def prepare(self, step: StepInput, rows: Mapping[int, Row], shape: BatchShape | None = None) -> Prepared:
        """The batch of a step, padded to `shape` where that is given.

        Batches of one shape lie at the same addresses; all that comes from the host comes in one copy.
        """
        self._send_edits()
        lengths = _Lengths.of(step.rows, self.padding_row, shape)
        shape = shape or shape_of(step)
        tokens, targets = _tokens(step.rows, rows, lengths, shape.num_tokens)
        token_rows, positions = lengths.token_rows, lengths.positions(shape.num_tokens)
        slots = [self._slots(table, token_rows, positions) for table in self.tables_host]
        samples = np.array([sample.row for sample in step.samples], dtype=np.int64)
        host: list[Array] = [*slots, targets, tokens, positions, lengths.query_start, lengths.seq_lens, lengths.rows]
        views = self._packet.send([*host, samples, lengths.last_tokens(step)])
        target, token, position, query_start, seq_lens, row_index, sample_rows, sample_index = views[len(slots) :]
        token.index_copy_(0, target, self.last_token.index_select(0, row_index))
        batch = Batch(
            shape,
            token[: shape.num_tokens],
            position,
            query_start,
            seq_lens,
            row_index,
            tuple(self._gather(group, row_index, lengths) for group in range(len(slots))),
            tuple(views[: len(slots)]),
            sample_index,
            lengths.query_start.tolist(),
            lengths.seq_lens.tolist(),
        )
        return Prepared(batch, sample_rows)

    def padding(self, shape: BatchShape) -> Batch:
        """A batch of nothing but padding, where all batches of `shape` lie."""
        return self.prepare(StepInput(-1), {}, shape).batch

    def _slots(self, table: Ints, token_rows: Ints, positions: Ints) -> Longs:
        """Where each token's K and V go [T]; -1 for padding."""
        slots = np.empty(len(positions), dtype=np.int64)
        live = slots[: len(token_rows)]
        indices, offsets = np.divmod(positions[: len(token_rows)], self.block_size)
        live[:] = table[token_rows, indices]
        live *= self.block_size
        live += offsets
        slots[len(token_rows) :] = -1
        return slots

    def _gather(self, group: int, row_index: torch.Tensor, lengths: "_Lengths") -> torch.Tensor:
        """The requests' block tables [R, B]: on a GPU all entries, so that strides and addresses stay."""
        table = self.tables[group]
        if self.device.type == "cpu":
            width = -(-int(lengths.seq_lens.max()) // self.block_size)
            return table[:, :width].index_select(0, row_index)
        return torch.index_select(table, 0, row_index, out=self._gathered[group][: len(row_index)])


def shape_of(step: StepInput) -> BatchShape:
    """The shape of a step's batch without padding."""
    counts = [row.num_tokens for row in step.rows]
    return BatchShape(sum(counts), len(counts), max(counts), counts.count(1))


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Each request's row, tokens before the step, and tokens of the step; the first `num_live` are no padding."""

    num_live: int
    one_each: bool
    """Whether each request that is no padding has one token."""
    rows: Ints
    starts: Ints
    counts: Ints
    query_start: Ints
    seq_lens: Ints

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledRow], padding_row: int, shape: BatchShape | None) -> "_Lengths":
        """The lengths of a step's rows, padded to `shape`: in a graph of decodes padding has a token each."""
        num_live = len(scheduled)
        size = shape.num_requests if shape else num_live
        padding = [0] * (size - num_live)
        tokens = [row.num_tokens for row in scheduled]
        rows = np.array([row.row for row in scheduled] + [padding_row] * len(padding), dtype=np.int32)
        starts = np.array([row.start for row in scheduled] + padding, dtype=np.int32)
        counts = np.array(tokens + padding, dtype=np.int32)
        seq_lens = starts + counts
        if shape and shape.num_decodes == size:
            counts[num_live:] = 1
        query_start = np.zeros(size + 1, dtype=np.int32)
        counts.cumsum(out=query_start[1:])
        return cls(num_live, tokens.count(1) == num_live, rows, starts, counts, query_start, seq_lens)

    @property
    def token_rows(self) -> Ints:
        """The row of each token that is no padding."""
        rows = self.rows[: self.num_live]
        return rows if self.one_each else rows.repeat(self.counts[: self.num_live])

    def positions(self, num_tokens: int) -> Ints:
        """Each token's place in its request [num_tokens]; 0 for padding."""
        live = slice(self.num_live)
        positions = np.zeros(num_tokens, dtype=np.int32)
        if self.one_each:
            positions[live] = self.starts[live]
        else:
            firsts = (self.starts[live] - self.query_start[live]).repeat(self.counts[live])
            positions[: len(firsts)] = np.arange(len(firsts), dtype=np.int32) + firsts
        return positions

    def last_tokens(self, step: StepInput) -> Ints:
        """The token whose logits each sample takes [S]: the last of its source's part of the batch."""
        ends = self.query_start[1:] - 1
        sources = [sample.source for sample in step.samples]
        if sources == [row.row for row in step.rows]:
            return ends[: self.num_live]
        last = dict(zip(self.rows.tolist(), ends.tolist(), strict=True))
        return np.array([last[source] for source in sources], dtype=np.int32)


def _tokens(
    scheduled: Sequence[ScheduledRow], rows: Mapping[int, Row], lengths: _Lengths, num_tokens: int
) -> tuple[Ints, Longs]:
    """Known tokens [T + 1], and the place of the token that the device sampled for each request [R]: T for none."""
    tokens = np.zeros(num_tokens + 1, dtype=np.int32)
    targets = np.full(len(lengths.rows), num_tokens, dtype=np.int64)
    targets[: lengths.num_live] = lengths.query_start[1 : lengths.num_live + 1] - 1
    for i in [i for i, one in enumerate(scheduled) if one.start < len(rows[one.row].token_ids)]:
        one, begin = scheduled[i], lengths.query_start[i]
        part = rows[one.row].token_ids[one.start : one.start + one.num_tokens]
        tokens[begin : begin + len(part)] = part
        if len(part) == one.num_tokens:
            targets[i] = num_tokens
    return tokens, targets


def _packet_bytes(max_requests: int, max_tokens: int, num_groups: int) -> int:
    """The most that a batch sends."""
    longs = num_groups * [max_tokens] + 2 * [max_requests]
    ints = 2 * [max_tokens + 1] + 4 * [max_requests + 1]
    return sum(padded_bytes(8 * n) for n in longs) + sum(padded_bytes(4 * n) for n in ints)
