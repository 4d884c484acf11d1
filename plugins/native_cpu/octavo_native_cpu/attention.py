"""Decode attention straight from the blocks, in C; batches with prompts are shared with the torch reference."""

import ctypes
from array import array
from dataclasses import dataclass
from typing import Any

import torch
from octavo.attention.combinators import by_phase
from octavo.attention.interface import AttentionSpec, GraphSupport
from octavo.attention.torch_reference import TorchAttention
from octavo.batch import Batch, BatchShape
from octavo.kv_cache.interface import KVCache

from octavo_native_cpu.ops import SUFFIXES, function, why_not_here

MAX_HEAD_DIM, LANES = 256, 16  # as in attention_plan.h and vectors.h
PART_TOKENS = 64  # a request is cut into parts of no fewer tokens
MANY_PARTS = 32  # and into no more than gives the batch so many, so that a few long ones occupy all threads
MANY_TOKENS = 256  # keys of all KV heads from which threads are worth waking
_NO_WINDOW = 1 << 40


class PlanStruct(ctypes.Structure):
    """csrc/attention_plan.h's struct plan."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("lens", "table", "scratch")),
        *((name, ctypes.c_int64) for name in ("table_stride", "num_requests", "num_kv_heads", "group")),
        *((name, ctypes.c_int64) for name in ("head_dim", "block_size", "window", "num_parts", "threads")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """`address` is that of the filled struct; `kept` are the objects that it points into."""

    address: int
    num_requests: int
    kept: tuple[object, ...]


class NativeDecode:
    """Batches of one-token requests, padding included."""

    features = frozenset({"window"})
    kv_layouts: frozenset[str] | None = frozenset({"plain"})
    graph_support = GraphSupport.NONE
    deterministic = True
    batch_invariant = False

    @staticmethod
    def why_not(spec: AttentionSpec, options: Any) -> str | None:
        """Serves bfloat16 and float32 on a CPU, once a C compiler has been found."""
        if spec.head_dim % LANES or spec.head_dim > MAX_HEAD_DIM:
            return f"native has heads of a multiple of {LANES} up to {MAX_HEAD_DIM}, not of {spec.head_dim}"
        return why_not_here(spec.device.type, spec.dtype)

    @staticmethod
    def scratch_bytes(spec: AttentionSpec, options: Any) -> int:
        """Each part's sums, and its largest score and their total, in float32."""
        return 4 * MANY_PARTS * (spec.num_heads // spec.num_kv_heads) * (spec.head_dim + 2)

    @staticmethod
    def persistent_bytes(spec: AttentionSpec, options: Any) -> int:
        """Nothing is kept."""
        return 0

    def __init__(self, spec: AttentionSpec, options: Any, scratch: torch.Tensor) -> None:
        self.spec = spec
        self.scratch = scratch
        self.window: int = spec.features.get("window") or _NO_WINDOW
        decode = f"decode_{SUFFIXES[spec.dtype]}"
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._decode = function(decode, [pointer, pointer, number, pointer, pointer, number, pointer, pointer])

    def warmup(self, shapes: list[BatchShape]) -> None:
        """All was compiled before the first backend was built."""

    def plan(self, batch: Batch) -> DecodePlan:
        """Copy the host's lengths and cut few long requests into parts. Threads have no say in that (C12)."""
        spec, lens, table = self.spec, batch.seq_lens_host, batch.block_tables[self.spec.group]
        host, count = array("i", lens), len(lens)
        tokens = sum(min(n, self.window) for n in lens)
        longest = min(max(lens, default=0), self.window)
        pairs = max(1, count * spec.num_kv_heads)
        struct = PlanStruct(
            host.buffer_info()[0],
            table.data_ptr(),
            self.scratch.data_ptr(),
            table.stride(0),
            count,
            spec.num_kv_heads,
            spec.num_heads // spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            self.window,
            max(1, min(MANY_PARTS // pairs, -(-longest // PART_TOKENS))),
            torch.get_num_threads() if tokens * spec.num_kv_heads >= MANY_TOKENS else 1,
            spec.scale,
        )
        return DecodePlan(ctypes.addressof(struct), count, (struct, host, table))

    def forward(
        self,
        plan: DecodePlan,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attend: q [T, Hq, D] -> out [T, Hq, D]."""
        k = kv.k
        self._decode(
            plan.address,
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            kv.v.data_ptr(),
            k.stride(0),
            out.data_ptr(),
            None if lse is None else lse.data_ptr(),
        )
        if plan.num_requests < len(q):  # padding beyond the requests
            out[plan.num_requests :] = 0
            if lse is not None:
                lse[plan.num_requests :] = float("-inf")


_Mixed = by_phase(NativeDecode, TorchAttention)


class NativeAttention(NativeDecode):
    """Decodes in C. Where a batch has prompts too, those go to the torch reference."""

    def __init__(self, spec: AttentionSpec, options: Any, scratch: torch.Tensor) -> None:
        super().__init__(spec, options, scratch)
        self.mixed = _Mixed(spec, options, scratch)

    def plan(self, batch: Batch) -> Any:
        """As NativeDecode, or the two backends' plans."""
        shape = batch.shape
        return super().plan(batch) if shape.num_decodes == shape.num_requests else self.mixed.plan(batch)

    def forward(
        self,
        plan: Any,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attend: q [T, Hq, D] -> out [T, Hq, D]."""
        if isinstance(plan, DecodePlan):
            super().forward(plan, q, kv, out, lse, new)
        else:
            self.mixed.forward(plan, q, kv, out, lse, new)
