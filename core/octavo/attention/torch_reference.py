"""The torch reference attention: any device, dtype and KV format, and fast on a CPU.

Decoding requests are gathered from their blocks and attended together; prompts one by one, or together where they are
of one length. Slots past a request's end may hold any bits (contract C10): keys and values there are zeroed and masked.
It allocates and plans on the host's lengths, so it stays outside CUDA graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from octavo.attention.interface import AttentionSpec, GraphSupport
from octavo.batch import Batch, BatchShape
from octavo.kv_cache.interface import KVCache

_WASTE = 0.5  # requests share a gather while the shortest fills at least this part of the longest
_SCORES_AT_ONCE = 1 << 24  # float32 scores held at a time where the softmax is spelt out
_MANY_KEYS = 1 << 19  # elements of keys from which batched products beat torch's own attention on a CPU

Lens = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Requests of one token, gathered together. `rows` None means tokens 0, 1, ..., `count` - 1.

    `gather` [2 * count * Hk * B] indexes heads of pages, `unused` the gathered tokens that hold any bits, and `mask`
    [count, 1, 1, length] is added to the scores. Without a mask every query sees the first `length` tokens.
    """

    rows: torch.Tensor | None
    count: int
    length: int
    gather: torch.Tensor
    unused: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Prompts:
    """`count` requests of `query_len` tokens each, from token `start` on.

    They see tokens `first` to `end` of `blocks` (in the plain layout: of the heads of pages that `blocks` indexes).
    `fresh` ones have no tokens before these, so that this step's keys and values are all they see. `mask`
    [query_len, end - first] is added to the scores; None is the causal one of a square.
    """

    start: int
    count: int
    query_len: int
    first: int
    end: int
    blocks: torch.Tensor
    fresh: bool
    mask: torch.Tensor | None

    @property
    def tokens(self) -> slice:
        """The requests' tokens in the batch."""
        return slice(self.start, self.start + self.count * self.query_len)


@dataclass(frozen=True, slots=True)
class _Plan:
    decodes: list[_Decodes]
    prompts: list[_Prompts]
    padding: list[slice]


class TorchAttention:
    """Paged attention by gather and torch's scaled-dot-product attention."""

    features = frozenset({"window", "softcap"})
    kv_layouts: frozenset[str] | None = None
    graph_support = GraphSupport.NONE
    deterministic = True
    batch_invariant = False

    @staticmethod
    def why_not(spec: AttentionSpec, options: Any) -> str | None:
        """Serves everything."""
        return None

    @staticmethod
    def scratch_bytes(spec: AttentionSpec, options: Any) -> int:
        """Torch allocates what it needs."""
        return 0

    @staticmethod
    def persistent_bytes(spec: AttentionSpec, options: Any) -> int:
        """Nothing is kept."""
        return 0

    def __init__(self, spec: AttentionSpec, options: Any, scratch: torch.Tensor) -> None:
        self.spec = spec
        self.window: int | None = spec.features.get("window")
        self.softcap: float = spec.features.get("softcap") or 0.0
        self.gathers = spec.kv_layout == "plain"
        self.group_size = spec.num_heads // spec.num_kv_heads
        self.multiplies = spec.device.type == "cpu" and spec.dtype is torch.bfloat16 and not self.softcap

    def warmup(self, shapes: list[BatchShape]) -> None:
        """Torch compiles nothing."""

    # -- plan -------------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch) -> _Plan:
        """Group the batch's requests, and index the blocks that each group reads."""
        lens, starts = batch.seq_lens_host, batch.query_start_host
        table = batch.block_tables[self.spec.group]
        live = [i for i, n in enumerate(lens) if n and starts[i + 1] > starts[i]]
        decodes = [i for i in live if starts[i + 1] - starts[i] == 1 and starts[i] == i] if self.gathers else []
        together = set(decodes)
        prompts = [i for i in live if i not in together]
        return _Plan(
            [self._plan_decodes(rows, lens, table) for rows in _similar(decodes, lambda i: self._span(lens[i]))],
            self._plan_prompts(prompts, lens, starts, table),
            _gaps([(starts[i], starts[i + 1]) for i in live], batch.token_ids.shape[0]),
        )

    def _first_block(self, position: int) -> int:
        """The first block that a query at `position` sees."""
        return 0 if self.window is None else max(0, position + 1 - self.window) // self.spec.block_size

    def _span(self, seq_len: int) -> int:
        """Tokens from the first block that the last token sees."""
        return seq_len - self._first_block(seq_len - 1) * self.spec.block_size

    def _plan_decodes(self, rows: list[int], lens: list[int], table: torch.Tensor) -> _Decodes:
        count, size, device = len(rows), self.spec.block_size, table.device
        spans = [self._span(lens[i]) for i in rows]
        longest = max(spans)
        columns = torch.arange(-(-longest // size), device=device)
        index = None if rows == list(range(count)) else torch.tensor(rows, device=device)
        blocks = table[:count] if index is None else table[index]
        firsts = [self._first_block(lens[i] - 1) for i in rows]
        if any(firsts):
            places = torch.tensor(firsts, device=device).view(-1, 1) + columns
            blocks = blocks.gather(1, places.clamp_(max=blocks.shape[1] - 1))
        blocks = blocks[:, : len(columns)]
        if min(spans) == longest and (self.window is None or longest <= self.window):
            return _Decodes(index, count, longest, self._heads_of(blocks), None, None)
        ends = torch.tensor(spans, device=device).view(-1, 1)
        # Past its end a request reads its first block again, whose bits are numbers, and not any bits.
        blocks = torch.where(columns * size < ends, blocks, blocks[:, :1])
        length = len(columns) * size
        positions = torch.arange(length, device=device).view(1, -1)
        seen = positions < ends
        if self.window is not None:
            seen &= positions >= ends - self.window
        mask = self._added(seen).view(count, 1, 1, length)
        return _Decodes(index, count, length, self._heads_of(blocks), self._unused(ends, positions), mask)

    def _unused(self, ends: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Where requests that end at `ends` [R, 1] gather any bits: past the end of a last block or its repeats."""
        size, num_heads = self.spec.block_size, self.spec.num_kv_heads
        last = (positions < (ends + size - 1) // size * size) | (positions % size >= ends)
        requests, places = ((positions >= ends) & last).nonzero(as_tuple=True)
        heads = torch.arange(num_heads, device=ends.device).view(-1, 1) + requests * num_heads
        unused = heads * positions.numel() + places
        values = len(ends) * num_heads * positions.numel()
        unused = torch.cat((unused, unused + values)).view(-1)
        return unused if len(unused) else None

    def _plan_prompts(
        self, requests: list[int], lens: list[int], starts: list[int], table: torch.Tensor
    ) -> list[_Prompts]:
        plans: list[_Prompts] = []
        masks: dict[tuple[int, int], torch.Tensor] = {}
        size = self.spec.block_size
        for i in requests:
            start, query_len, seq_len = starts[i], starts[i + 1] - starts[i], lens[i]
            fresh = query_len == seq_len and self.gathers
            skipped = self._first_block(seq_len - query_len)
            blocks = table[i : i + 1, skipped : -(-seq_len // size)]
            last = plans[-1] if plans else None
            if last and fresh and last.fresh and last.query_len == query_len and last.tokens.stop == start:
                plans[-1] = replace(last, count=last.count + 1, blocks=torch.cat((last.blocks, blocks)))
                continue
            end = seq_len - skipped * size
            first = 0 if self.window is None else max(0, end - query_len + 1 - self.window)
            mask = None
            if query_len > 1 and (not fresh or self.window is not None):
                shape = (query_len, end - first)
                mask = masks[shape] if shape in masks else self._added(self._seen(*shape, table.device))
                masks = {shape: mask}
            plans.append(_Prompts(start, 1, query_len, first, end, blocks, fresh, mask))
        if self.gathers:
            return [replace(plan, blocks=self._heads_of(plan.blocks)) for plan in plans]
        return plans

    def _heads_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Where the keys, then the values of blocks [R, B] lie among the heads of all pages, [2 * R * Hk * B]."""
        num_heads = self.spec.num_kv_heads
        heads = torch.arange(2 * num_heads, device=blocks.device).view(2, 1, -1, 1)
        return (blocks.long().unsqueeze(1) * (2 * num_heads) + heads).reshape(-1)

    def _seen(self, query_len: int, num_keys: int, device: torch.device) -> torch.Tensor:
        """True where query i, at num_keys - query_len + i, sees key j (contract C1)."""
        queries = torch.arange(num_keys - query_len, num_keys, device=device).view(-1, 1)
        keys = torch.arange(num_keys, device=device).view(1, -1)
        seen = keys <= queries
        return seen if self.window is None else seen & (keys > queries - self.window)

    def _added(self, seen: torch.Tensor) -> torch.Tensor:
        """What masks scores when it is added to them: made once a step, and not by every layer."""
        dtype = self.spec.dtype if self.gathers else torch.float32
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        plan: _Plan,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attend: q [T, Hq, D] -> out [T, Hq, D]."""
        for decodes in plan.decodes:
            self._forward_decodes(decodes, q, kv, out, lse)
        for prompts in plan.prompts:
            self._forward_prompts(prompts, q, kv, out, lse, new)
        for tokens in plan.padding:
            out[tokens] = 0
            if lse is not None:
                lse[tokens] = float("-inf")

    def _forward_decodes(
        self, plan: _Decodes, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        spec = self.spec
        k, v = self._gather(kv, plan.gather, plan.count, plan.unused)
        k, v = k[:, :, : plan.length], v[:, :, : plan.length]
        rows = slice(plan.count) if plan.rows is None else plan.rows
        queries = q[rows].view(plan.count, spec.num_kv_heads, self.group_size, spec.head_dim)
        if self.multiplies and lse is None and k.numel() >= _MANY_KEYS:
            result, result_lse = self._attend_by_products(queries, k, v, plan.mask), None
        else:
            result, result_lse = self._attend(queries, k, v, plan.mask, False, lse is not None)
        out[rows] = result.reshape(plan.count, spec.num_heads, spec.head_dim).to(out.dtype)
        if lse is not None and result_lse is not None:
            lse[rows] = result_lse.reshape(plan.count, spec.num_heads)

    def _gather(
        self, kv: KVCache, heads: torch.Tensor, count: int, unused: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [count, Hk, length, D]: each index of `heads` copies one head's tokens of one block."""
        spec = self.spec
        size = spec.block_size * spec.head_dim
        rows = kv.k.as_strided((2 * kv.k.shape[0] * spec.num_kv_heads, size), (size, 1))
        tokens = rows.index_select(0, heads).view(2, count, spec.num_kv_heads, -1, spec.head_dim)
        if unused is not None:
            tokens.view(-1, spec.head_dim).index_fill_(0, unused, 0)
        return tokens[0], tokens[1]

    def _forward_prompts(
        self,
        plan: _Prompts,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        new: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        tokens = plan.tokens
        if plan.fresh and new is not None:
            k, v = (_split(x[tokens], plan.count) for x in new)
        elif self.gathers:
            k, v = (x[:, :, plan.first : plan.end] for x in self._gather(kv, plan.blocks, plan.count))
        else:
            k, v = (_split(x[plan.first :], 1) for x in self.spec.cache_format.read(kv, plan.blocks[0], plan.end))
        queries = _split(q[tokens], plan.count).to(k.dtype)
        causal = plan.mask is None and plan.query_len > 1
        result, result_lse = self._attend(queries, k, v, plan.mask, causal, lse is not None)
        out[tokens].view(plan.count, plan.query_len, *out.shape[1:]).copy_(result.transpose(1, 2))
        if lse is not None and result_lse is not None:
            lse[tokens].view(plan.count, plan.query_len, -1).copy_(result_lse.transpose(1, 2))

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        with_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q [R, H, T, D] over k, v [R, Hk, L, D]; heads of q are Hk groups, or one token's group of each KV head."""
        if with_lse or self.softcap:
            return self._attend_exactly(q, k, v, mask, causal)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.spec.scale, enable_gqa=grouped
        ), None

    def _attend_by_products(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """As `_attend`, of many requests' few queries: two or three products in all, not two for each head.

        A product rounds its float32 sums to bfloat16, too coarse for scores: a second one gives what the first lost.
        """
        queries, keys, values = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        keys = keys.transpose(1, 2)
        rounded = torch.bmm(queries, keys)
        lost = torch.baddbmm(rounded, queries, keys, beta=-1)
        scores = rounded.float().add_(lost).mul_(self.spec.scale).view(*q.shape[:3], -1)
        if mask is not None:
            scores += mask
        weights = torch.softmax(scores, -1).to(q.dtype)
        return torch.bmm(weights.view(*rounded.shape), values).view(q.shape)

    def _attend_exactly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax in float32 by its definition (contract C11), with the log of its denominator (C8)."""
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.float().repeat_interleave(repeats, dim=1) for x in (k, v))
        if causal:
            mask = self._added(self._seen(q.shape[2], k.shape[2], q.device))
        at_once = max(1, _SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
        results = []
        for begin in range(0, q.shape[2], at_once):
            part = slice(begin, begin + at_once)
            scores = (q[:, :, part].float() @ k.transpose(-1, -2)) * self.spec.scale
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            if mask is not None:
                scores += mask if mask.shape[-2] == 1 else mask[part]
            results.append((torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)))
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _similar(requests: list[int], length: Lens) -> list[list[int]]:
    """Requests in groups of similar length, so that padding a group to its longest wastes little."""
    if not requests:
        return []
    if min(map(length, requests)) >= _WASTE * max(map(length, requests)):
        return [requests]
    groups: list[list[int]] = []
    for i in sorted(requests, key=length, reverse=True):
        if groups and length(i) >= _WASTE * length(groups[-1][0]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _gaps(spans: list[tuple[int, int]], end: int) -> list[slice]:
    """What the ascending spans leave of 0 to `end`: the padding's tokens."""
    begins = [0, *(stop for _, stop in spans)]
    ends = [*(start for start, _ in spans), end]
    return [slice(begin, stop) for begin, stop in zip(begins, ends, strict=True) if begin < stop]


def _split(x: torch.Tensor, count: int) -> torch.Tensor:
    """[count * T, H, D] as [count, H, T, D]."""
    return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2)
