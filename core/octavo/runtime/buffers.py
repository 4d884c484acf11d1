"""The runner's persistent buffers, and the way from a StepInput to a Batch."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from octavo.batch import Batch, BatchShape
from octavo.engine.step import ScheduledRows, StepInput
from octavo.runtime.rows import RowTable
from octavo.runtime.sizes import roomy
from octavo.runtime.transfer import Packet, Size, padded_bytes, to_device

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step's batch, the rows [S] int64 whose tokens it samples, and what `take_sampled` needs.

    `tokens` are the batch's with one place more, and `targets` [R] int64 says where in them the token goes that the
    device sampled for each request: the last place for one that needs none.
    """

    batch: Batch
    sample_rows: torch.Tensor
    tokens: torch.Tensor
    targets: torch.Tensor


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
        self.max_tokens = max_tokens
        self.tables_host = [np.zeros((max_requests + 1, max_blocks), dtype=np.int32) for _ in range(num_groups)]
        self.tables = [ints(max_requests + 1, max_blocks) for _ in range(num_groups)]
        self.last_token = ints(max_requests + 1)
        self._gathered = [ints(max_requests, max_blocks) for _ in range(num_groups)]
        self._numbers = np.arange(max(max_requests, max_tokens) + 1, dtype=np.int32)
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

    def prepare(self, step: StepInput, rows: RowTable, shape: BatchShape | None = None) -> Prepared:
        """The batch of a step, padded to `shape` where that is given, without what `take_sampled` and `gather` add.

        Batches of one shape lie at the same addresses; all that comes from the host comes in one copy. On a GPU the
        numbers of tokens and of `sample_index` are `roomy` ones.
        """
        self._send_edits()
        shape = shape or self._roomy(shape_of(step))
        number = len(step.samples.row)
        room = self._room(number, min(self.padding_row, max(number, self.max_tokens)))  # more than tokens: forks
        arrays = self._packet.open(_sizes(shape, len(self.tables), room, number))
        host = _Host(arrays[:-_OTHERS], *arrays[-_OTHERS:])
        self._fill_lengths(host, step.rows, shape)
        token_rows = self._fill_positions(host, step.rows)
        for slots, table in zip(host.slots, self.tables_host, strict=True):
            self._fill_slots(slots, table, token_rows, host.positions)
        _fill_samples(host, step)
        _fill_tokens(host, step.rows, rows)
        views = self._packet.send()
        targets, tokens, position, query_start, seq_lens, row_index, sample_index, sample_rows = views[-_OTHERS:]
        seq_lens_host = host.seq_lens.tolist()
        batch = Batch(
            shape,
            tokens[: shape.num_tokens],
            position,
            query_start,
            seq_lens,
            row_index,
            self._tables_of(row_index, seq_lens_host),
            tuple(views[:-_OTHERS]),
            sample_index,
            host.query_start.tolist(),
            seq_lens_host,
        )
        return Prepared(batch, sample_rows, tokens, targets)

    def gather(self, batch: Batch) -> None:
        """Put the requests' block tables into a batch on a GPU; part of its graph where plans are."""
        if self.device.type != "cpu":
            for table, room in zip(self.tables, batch.block_tables, strict=True):
                torch.index_select(table, 0, batch.row_index, out=room)

    def take_sampled(self, prepared: Prepared) -> None:
        """Put the tokens that the device sampled last into the batch; part of its graph."""
        sampled = self.last_token.index_select(0, prepared.batch.row_index)
        prepared.tokens.index_copy_(0, prepared.targets, sampled)

    def padding(self, shape: BatchShape) -> Prepared:
        """A batch of nothing but padding, where all batches of `shape` lie."""
        return self.prepare(StepInput(-1), RowTable(0), shape)

    def ends(self, step: StepInput, batch: Batch) -> Batch:
        """The tokens of a step's batch whose logits are sampled, as a batch of requests that compute one token."""
        samples, tokens = step.samples, batch.sample_index
        number, num_live = len(tokens), len(samples.row)
        both = np.zeros((2, number), dtype=np.int32)
        both[0, num_live:] = self.padding_row
        both[:, :num_live] = samples.source, samples.position
        sources, seq_lens = to_device(both, self.device)
        return Batch(
            BatchShape(number, number, 1, number),
            batch.token_ids.index_select(0, tokens),
            batch.positions.index_select(0, tokens),
            torch.arange(number + 1, dtype=torch.int32, device=self.device),
            seq_lens,
            sources,
            tuple(table.index_select(0, sources) for table in self.tables),
            tuple(slots.index_select(0, tokens) for slots in batch.slots),
            torch.arange(number, dtype=torch.int32, device=self.device),
            list(range(number + 1)),
            both[1].tolist(),
        )

    def _room(self, number: int, most: int) -> int:
        return number if self.device.type == "cpu" else roomy(number, most)

    def _roomy(self, shape: BatchShape) -> BatchShape:
        """The shape with room; where all are decodes, padding is requests of a token each."""
        if shape.num_decodes == shape.num_requests:
            number = self._room(shape.num_requests, min(self.padding_row, self.max_tokens))
            return BatchShape(number, number, 1, number)
        return replace(shape, num_tokens=self._room(shape.num_tokens, self.max_tokens))

    def _fill_lengths(self, host: "_Host", rows: ScheduledRows, shape: BatchShape) -> None:
        """Rows, starts of queries and lengths, those of padding too: where all are decodes it has a token each."""
        num_live, size, one_each = len(rows.row), len(host.row_index), _one_each(rows)
        host.row_index[:num_live] = rows.row
        host.row_index[num_live:] = self.padding_row
        host.seq_lens[:num_live] = rows.start
        host.seq_lens[:num_live] += 1 if one_each else np.asarray(rows.num_tokens)
        host.seq_lens[num_live:] = 0
        if shape.num_decodes == size:
            host.query_start[:] = self._numbers[: size + 1]
        else:
            host.query_start[0] = 0
            np.cumsum(rows.num_tokens, out=host.query_start[1 : num_live + 1])
            host.query_start[num_live + 1 :] = host.query_start[num_live]

    def _fill_positions(self, host: "_Host", rows: ScheduledRows) -> Ints:
        """Each token's place in its request, 0 for padding; the row of each token that is no padding."""
        num_live = len(rows.row)
        token_rows = host.row_index[:num_live]
        if _one_each(rows):
            host.positions[:num_live] = rows.start
        else:
            firsts = (rows.start - host.query_start[:num_live]).repeat(rows.num_tokens)
            token_rows = token_rows.repeat(rows.num_tokens)
            np.add(self._numbers[: len(firsts)], firsts, out=host.positions[: len(firsts)])
        host.positions[len(token_rows) :] = 0
        return token_rows

    def _fill_slots(self, slots: Longs, table: Ints, token_rows: Ints, positions: Ints) -> None:
        """Where each token's K and V go; -1 for padding."""
        live = slots[: len(token_rows)]
        indices, offsets = np.divmod(positions[: len(token_rows)], self.block_size)
        live[:] = table[token_rows, indices]  # 64 bits, since a cache may hold more than 2^31 slots
        live *= self.block_size
        live += offsets
        slots[len(token_rows) :] = -1

    def _tables_of(self, row_index: torch.Tensor, seq_lens: list[int]) -> tuple[torch.Tensor, ...]:
        """The requests' block tables [R, B]: on a GPU room for all entries, so that strides and addresses stay."""
        if self.device.type == "cpu":
            width = -(-max(seq_lens) // self.block_size)
            return tuple(table[:, :width].index_select(0, row_index) for table in self.tables)
        return tuple(room[: len(seq_lens)] for room in self._gathered)


def shape_of(step: StepInput) -> BatchShape:
    """The shape of a step's batch without padding."""
    counts = step.rows.num_tokens
    return BatchShape(sum(counts), len(counts), max(counts), counts.count(1))


@dataclass(frozen=True, slots=True)
class _Host:
    """What the host sends of a batch; besides the batch's own: for each request the place of its token that the device
    sampled (T for none), and the rows that are sampled."""

    slots: list[Longs]
    targets: Longs
    tokens: Ints
    positions: Ints
    query_start: Ints
    seq_lens: Ints
    row_index: Ints
    sample_index: Ints
    sample_rows: Longs


_OTHERS = 8  # of the arrays are no slots


def _sizes(shape: BatchShape, num_groups: int, num_ends: int, num_samples: int) -> tuple[Size, ...]:
    """Lengths and bytes of an element of what the host sends: samples last, whose number does not move the others."""
    tokens, requests = shape.num_tokens, shape.num_requests
    longs, ints = (*[tokens] * num_groups, requests), (tokens + 1, tokens, requests + 1, requests, requests)
    return *((n, 8) for n in longs), *((n, 4) for n in ints), (num_ends, 4), (num_samples, 8)


def _one_each(rows: ScheduledRows) -> bool:
    return rows.num_tokens.count(1) == len(rows.row)


def _fill_samples(host: _Host, step: StepInput) -> None:
    """The rows that are sampled, and the token whose logits each takes: the last of its source's part of the batch."""
    rows, samples = step.rows.row, step.samples
    host.sample_rows[:] = samples.row
    ends, sampled = host.query_start[1 : len(rows) + 1], host.sample_index[: len(samples.row)]
    host.sample_index[len(sampled) :] = 0
    if samples.source == rows:
        np.subtract(ends, 1, out=sampled)
    else:
        last = dict(zip(rows, ends.tolist(), strict=True))
        sampled[:] = [last[source] - 1 for source in samples.source]


def _fill_tokens(host: _Host, scheduled: ScheduledRows, rows: RowTable) -> None:
    """Known tokens, and where those go that the device sampled."""
    num_live, nowhere = len(scheduled.row), len(host.positions)
    host.tokens[:] = 0
    host.targets[num_live:] = nowhere
    np.subtract(host.query_start[1 : num_live + 1], 1, out=host.targets[:num_live])
    known = rows.num_known[host.row_index[:num_live]] > scheduled.start
    for i in known.nonzero()[0].tolist():
        row, start, count = scheduled[i]
        part, begin = rows[row].token_ids[start : start + count], host.query_start[i]
        host.tokens[begin : begin + len(part)] = part
        if len(part) == count:
            host.targets[i] = nowhere


def _packet_bytes(max_requests: int, max_tokens: int, num_groups: int) -> int:
    """The most that a batch sends."""
    sizes = _sizes(BatchShape(max_tokens, max_requests, max_tokens, 0), num_groups, max_requests, max_requests)
    return sum(padded_bytes(number * size) for number, size in sizes)
