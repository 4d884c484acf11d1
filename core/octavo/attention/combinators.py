"""Attention backends made of others: factories over factories, and backends themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from octavo.attention.interface import AttentionBackend, AttentionSpec, GraphSupport, plan_on_device
from octavo.batch import Batch, BatchShape
from octavo.kv_cache.interface import KVCache
from octavo.plugins.selection import Selection


@dataclass(frozen=True, slots=True)
class Part:
    """A backend's class with its options, for batches of one `phase`: "decode" or "prefill"."""

    phase: str
    cls: type[AttentionBackend]
    options: Any


@dataclass(frozen=True, slots=True)
class PhaseSelection(Selection):
    """A selection for one phase only."""

    phase: str = ""

    @classmethod
    def of(cls, selection: Selection, phase: str) -> "PhaseSelection":
        """The selection as one for `phase`."""
        s = selection
        return cls(s.kind, s.chosen, s.cls, s.options, s.candidates, phase)

    def as_dict(self) -> dict[str, Any]:
        """The selection and its phase as JSON can hold them."""
        return {**Selection.as_dict(self), "phase": self.phase}

    def for_human(self) -> str:
        """The selection's lines, with the phase in the first."""
        title, rest = Selection.for_human(self).split(":", 1)
        return f"{title} for {self.phase}:{rest}"


def by_phase(
    decode: type[AttentionBackend],
    prefill: type[AttentionBackend],
    decode_options: Any = None,
    prefill_options: Any = None,
) -> type[AttentionBackend]:
    """A backend that gives requests of one token to `decode` and the others to `prefill`, each with its own options.

    Built as any backend, `Backend(spec, options, scratch)`; its own options are not looked at.
    """
    parts = (Part("decode", decode, decode_options), Part("prefill", prefill, prefill_options))
    members = {
        "parts": parts,
        "features": decode.features & prefill.features,
        "kv_layouts": _both(decode.kv_layouts, prefill.kv_layouts),
        "graph_support": _graph_support(decode.graph_support, prefill.graph_support),
        "deterministic": decode.deterministic and prefill.deterministic,
        "plans_on_device": plan_on_device((decode, prefill)),
    }
    return type("ByPhase", (_ByPhase,), members)


def _both(a: frozenset[str] | None, b: frozenset[str] | None) -> frozenset[str] | None:
    """What both read, where None is anything."""
    return b if a is None else a if b is None else a & b


def _graph_support(decode: GraphSupport, prefill: GraphSupport) -> GraphSupport:
    """A graph of decodes holds no prefill. A mixed one fits none: where its decodes end differs from step to step."""
    if prefill < GraphSupport.UNIFORM:
        return min(decode, GraphSupport.DECODE)
    return min(decode, prefill, GraphSupport.UNIFORM)


class _ByPhase:
    """The product of `by_phase`: the first `shape.num_decodes` requests are one part's, the others the other's."""

    parts: ClassVar[tuple[Part, Part]]
    features: frozenset[str]
    kv_layouts: frozenset[str] | None
    graph_support: GraphSupport
    deterministic: bool
    plans_on_device: bool
    batch_invariant = False  # how a prompt is cut into steps decides which backend computes its last token

    @classmethod
    def why_not(cls, spec: AttentionSpec, options: Any) -> str | None:
        """The reasons of the parts that cannot serve."""
        reasons = [(part.phase, part.cls.why_not(spec, part.options)) for part in cls.parts]
        return "; ".join(f"for {phase}: {reason}" for phase, reason in reasons if reason is not None) or None

    @classmethod
    def scratch_bytes(cls, spec: AttentionSpec, options: Any) -> int:
        """The larger part's: one is done before the other begins."""
        return max(part.cls.scratch_bytes(spec, part.options) for part in cls.parts)

    @classmethod
    def persistent_bytes(cls, spec: AttentionSpec, options: Any) -> int:
        """Both parts'."""
        return sum(part.cls.persistent_bytes(spec, part.options) for part in cls.parts)

    def __init__(self, spec: AttentionSpec, options: Any, scratch: torch.Tensor) -> None:
        self.decode, self.prefill = (part.cls(spec, part.options, scratch) for part in self.parts)

    def warmup(self, shapes: list[BatchShape]) -> None:
        """Each part compiles what its share of the shapes can reach."""
        self.decode.warmup([_decodes_of(shape) for shape in shapes if shape.num_decodes])
        self.prefill.warmup([_others_of(shape) for shape in shapes if shape.num_requests > shape.num_decodes])

    def plan(self, batch: Batch) -> list[tuple[AttentionBackend, slice, Any]]:
        """Each part that has requests, its tokens, and its plan for them."""
        return [(part, tokens, part.plan(sub)) for part, tokens, sub in self._split(batch)]

    def _split(self, batch: Batch) -> Iterator[tuple[AttentionBackend, slice, Batch]]:
        """The parts' tokens and batches. One that has all requests gets the batch itself, padding and all."""
        count, num_tokens = batch.shape.num_decodes, batch.token_ids.shape[0]
        if count == 0:
            yield self.prefill, slice(0, num_tokens), batch
        elif count == batch.shape.num_requests:
            yield self.decode, slice(0, num_tokens), batch
        else:
            yield self.decode, slice(0, count), _decodes(batch)
            yield self.prefill, slice(count, num_tokens), _others(batch)

    def forward(
        self,
        plan: list[tuple[AttentionBackend, slice, Any]],
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attend: q [T, Hq, D] -> out [T, Hq, D]."""
        for part, tokens, own in plan:
            own_lse = None if lse is None else lse[tokens]
            own_new = None if new is None else (new[0][tokens], new[1][tokens])
            part.forward(own, q[tokens], kv, out[tokens], own_lse, own_new)


def _decodes_of(shape: BatchShape) -> BatchShape:
    return BatchShape(shape.num_decodes, shape.num_decodes, 1, shape.num_decodes)


def _others_of(shape: BatchShape) -> BatchShape:
    count = shape.num_decodes
    return BatchShape(shape.num_tokens - count, shape.num_requests - count, shape.max_query_len, 0)


def _decodes(batch: Batch) -> Batch:
    """The requests of one token; as everywhere in a step, `sample_index` stays the whole batch's."""
    count = batch.shape.num_decodes
    return _cut(
        batch,
        _decodes_of(batch.shape),
        slice(count),
        batch.query_start[: count + 1],
        batch.query_start_host[: count + 1],
    )


def _others(batch: Batch) -> Batch:
    """The requests of more tokens, whose query_start begins at 0 again."""
    count = batch.shape.num_decodes
    host = [start - count for start in batch.query_start_host[count:]]
    return _cut(batch, _others_of(batch.shape), slice(count, None), batch.query_start[count:] - count, host)


def _cut(batch: Batch, shape: BatchShape, part: slice, query_start: torch.Tensor, host: list[int]) -> Batch:
    """A part of the batch: `part` cuts tokens and requests alike, since the first requests have a token each."""
    return replace(
        batch,
        shape=shape,
        token_ids=batch.token_ids[part],
        positions=batch.positions[part],
        query_start=query_start,
        seq_lens=batch.seq_lens[part],
        row_index=batch.row_index[part],
        block_tables=tuple(table[part] for table in batch.block_tables),
        slots=tuple(slots[part] for slots in batch.slots),
        query_start_host=host,
        seq_lens_host=batch.seq_lens_host[part],
    )
