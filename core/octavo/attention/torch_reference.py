"""The torch reference attention: any device, dtype and KV format, and fast on a CPU.

Decoding requests are gathered from their blocks and attended together; prompts one by one, or together where they are of
one length. Slots past a request's end may hold any bits (contract C10): keys and values there are zeroed and masked.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from octavo.attention.interface import AttentionSpec, GraphSupport
from octavo.kv_cache.interface import KVCache
from octavo.runtime.batch import Batch, BatchShape

_WASTE = 0.5  # requests share a gather while the shortest fills at least this part of the longest


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Requests of one token, gathered together. `rows` None means tokens 0, 1, ..., `count` - 1.

    `gather` [count * Hk * B] indexes heads of pages; `unused` the gathered tokens that are not the requests'.
    """

    rows: torch.Tensor | None
    count: int
    length: int
    gather: torch.Tensor
    unused: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Prompts:
    """`count` requests of `query_len` tokens each, from token `start` on, with their `blocks` [count, B].

    `fresh` ones have no tokens before these, so that this step's keys and values are all they see.
    """

    start: int
    count: int
    query_len: int
    seq_len: int
    blocks: torch.Tensor
    fresh: bool
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    decodes: list[_Decodes]
    prompts: list[_Prompts]


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

    def warmup(self, shapes: list[BatchShape]) -> None:
        """Torch compiles nothing."""

    # -- plan -------------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch) -> _Plan:
        """Group the batch's requests, and index the blocks that each group reads."""
        lens, starts = batch.seq_lens_host, batch.query_start_host
        table = batch.block_tables[self.spec.group]
        live = [i for i, n in enumerate(lens) if n and starts[i + 1] > starts[i]]
        decodes = [i for i in live if starts[i + 1] - starts[i] == 1 and starts[i] == i] if self.gathers else []
        prompts = live[len(decodes) :]
        return _Plan(
            [self._plan_decodes(rows, lens, table) for rows in _similar(decodes, lens)],
            self._plan_prompts(prompts, lens, starts, table),
        )

    def _plan_decodes(self, rows: list[int], lens: list[int], table: torch.Tensor) -> _Decodes:
        spec, device = self.spec, table.device
        longest = max(lens[i] for i in rows)
        num_blocks = -(-longest // spec.block_size)
        in_order = rows == list(range(len(rows)))
        index = None if in_order else torch.tensor(rows, device=device)
        blocks = (table[: len(rows)] if index is None else table[index])[:, :num_blocks].long()
        heads = torch.arange(spec.num_kv_heads, device=device).view(1, -1, 1)
        gather = (blocks.unsqueeze(1) * (2 * spec.num_kv_heads) + heads).reshape(-1)
        if len(rows) == 1 and (self.window is None or longest <= self.window):
            return _Decodes(index, 1, longest, gather, None, None)
        length = num_blocks * spec.block_size
        ends = torch.tensor([lens[i] for i in rows], device=device).view(-1, 1)
        positions = torch.arange(length, device=device).view(1, -1)
        seen = positions < ends
        if self.window is not None:
            seen &= positions >= ends - self.window
        unused = (~seen).unsqueeze(1).expand(-1, spec.num_kv_heads, -1).reshape(-1).nonzero().view(-1)
        return _Decodes(index, len(rows), length, gather, unused, seen.view(len(rows), 1, 1, length))

    def _plan_prompts(
        self, requests: list[int], lens: list[int], starts: list[int], table: torch.Tensor
    ) -> list[_Prompts]:
        plans: list[_Prompts] = []
        masks: dict[tuple[int, int], torch.Tensor] = {}
        for i in requests:
            start, query_len, seq_len = starts[i], starts[i + 1] - starts[i], lens[i]
            fresh = query_len == seq_len and self.gathers
            blocks = table[i : i + 1, : -(-seq_len // self.spec.block_size)].long()
            last = plans[-1] if plans else None
            if last and fresh and last.fresh and last.query_len == query_len:
                blocks = torch.cat((last.blocks, blocks))
                plans[-1] = replace(last, count=last.count + 1, blocks=blocks)
                continue
            mask = None
            if not fresh or self.window is not None:
                shape = (query_len, seq_len)
                mask = masks[shape] if shape in masks else self._mask(*shape, table.device)
                masks = {shape: mask}
            plans.append(_Prompts(start, 1, query_len, seq_len, blocks, fresh, mask))
        return plans

    def _mask(self, query_len: int, seq_len: int, device: torch.device) -> torch.Tensor:
        """True where query i, at seq_len - query_len + i, sees key j (contract C1)."""
        queries = torch.arange(seq_len - query_len, seq_len, device=device).view(-1, 1)
        keys = torch.arange(seq_len, device=device).view(1, -1)
        seen = keys <= queries
        return seen if self.window is None else seen & (keys > queries - self.window)

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

    def _forward_decodes(
        self, plan: _Decodes, q: torch.Tensor, kv: KVCache, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        spec = self.spec
        k, v = (self._gather(pages, plan) for pages in (kv.k, kv.v))
        queries = q[: plan.count] if plan.rows is None else q[plan.rows]
        queries = queries.view(plan.count, spec.num_kv_heads, self.group_size, spec.head_dim)
        result, result_lse = self._attend(queries, k, v, plan.mask, False, lse is not None)
        rows = slice(plan.count) if plan.rows is None else plan.rows
        out[rows] = result.reshape(plan.count, spec.num_heads, spec.head_dim)
        if lse is not None and result_lse is not None:
            lse[rows] = result_lse.reshape(plan.count, spec.num_heads)

    def _gather(self, pages: torch.Tensor, plan: _Decodes) -> torch.Tensor:
        """The group's keys or values [count, Hk, length, D]: each index copies one head's tokens of one block."""
        spec = self.spec
        size = spec.block_size * spec.head_dim
        num_rows = (2 * pages.shape[0] - 1) * spec.num_kv_heads
        rows = pages.as_strided((num_rows, size), (size, 1))
        tokens = rows.index_select(0, plan.gather).view(plan.count, spec.num_kv_heads, -1, spec.head_dim)
        if plan.unused is None:
            return tokens[:, :, : plan.length]
        tokens.view(-1, spec.head_dim).index_fill_(0, plan.unused, 0)
        return tokens

    def _forward_prompts(
        self,
        plan: _Prompts,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        new: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        end = plan.start + plan.count * plan.query_len
        if plan.fresh and new is not None:
            k, v = (_split(x[plan.start : end], plan.count) for x in new)
        else:
            pairs = [self._read(kv, plan, blocks) for blocks in plan.blocks]
            k, v = (torch.stack(x).transpose(1, 2).to(q.dtype) for x in zip(*pairs, strict=True))
        queries = _split(q[plan.start : end], plan.count)
        result, result_lse = self._attend(queries, k, v, plan.mask, plan.mask is None, lse is not None)
        out[plan.start : end] = result.transpose(1, 2).reshape(end - plan.start, *out.shape[1:])
        if lse is not None and result_lse is not None:
            lse[plan.start : end] = result_lse.transpose(1, 2).reshape(end - plan.start, -1)

    def _read(self, kv: KVCache, plan: _Prompts, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.spec.cache_format.read(kv, blocks, plan.seq_len)
        if self.window is not None:
            # Blocks behind the window are gone, and the null block in their place holds any bits.
            first = max(0, plan.seq_len - plan.query_len - self.window + 1)
            k[:first], v[:first] = 0, 0
        return k, v

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
            q, k, v, attn_mask=mask, is_causal=causal and q.shape[2] > 1, scale=self.spec.scale, enable_gqa=grouped
        ), None

    def _attend_exactly(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax in float32 by its definition (contract C11), with the log of its denominator (C8)."""
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.float().repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = (q.float() @ k.transpose(-1, -2)) * self.spec.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (torch.softmax(scores, -1) @ v).to(q.dtype), torch.logsumexp(scores, -1)


def _similar(requests: list[int], lens: list[int]) -> list[list[int]]:
    """Requests in groups of similar length, so that padding a group to its longest wastes little."""
    if not requests:
        return []
    if min(lens[i] for i in requests) >= _WASTE * max(lens[i] for i in requests):
        return [requests]
    groups: list[list[int]] = []
    for i in sorted(requests, key=lambda i: lens[i], reverse=True):
        if groups and lens[i] >= _WASTE * lens[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _split(x: torch.Tensor, count: int) -> torch.Tensor:
    """[count * T, H, D] as [count, H, T, D]."""
    return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2)
