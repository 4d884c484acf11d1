"""The attention backend's interface (docs/design.md §6, contract C1 to C13)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import torch

from octavo.batch import Batch, BatchShape
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache, KVCacheFormat

API = 1


class GraphSupport(IntEnum):
    """Which batches a backend can serve inside a CUDA graph."""

    NONE = 0
    DECODE = 1
    UNIFORM = 2
    MIXED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Everything a backend may depend on. `features` maps each feature in use to its value; absent means off."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    kv_layout: str
    block_size: int
    max_requests: int
    max_tokens: int
    max_model_len: int
    device: DeviceInfo
    cache_format: KVCacheFormat
    group: int = 0
    features: Mapping[str, Any] = field(default_factory=dict)


class AttentionBackend(Protocol):
    """One object for all layers of one spec. Built as `Backend(spec, options, scratch)`.

    It may say `plans_on_device = True`: its `plan` launches kernels that read the batch's tensors, and does nothing
    else, so that a graph can hold it.
    """

    features: frozenset[str]
    kv_layouts: frozenset[str] | None
    """Names of the KV layouts it reads; None reads any, through the format's `read`."""
    graph_support: GraphSupport
    deterministic: bool
    batch_invariant: bool

    @staticmethod
    def why_not(spec: AttentionSpec, options: Any) -> str | None:
        """One sentence when the backend cannot serve `spec`, else None."""

    @staticmethod
    def scratch_bytes(spec: AttentionSpec, options: Any) -> int:
        """Bytes of the scratch that all backends share, dead after `forward`."""

    @staticmethod
    def persistent_bytes(spec: AttentionSpec, options: Any) -> int:
        """Bytes of device memory that the constructor keeps."""

    def __init__(self, spec: AttentionSpec, options: Any, scratch: torch.Tensor) -> None: ...

    def warmup(self, shapes: list[BatchShape]) -> None:
        """Compile all that `shapes` can reach."""

    def plan(self, batch: Batch) -> Any:
        """Prepare for a batch, once a step; outside the graph, unless `plans_on_device`. Plans are never mutated."""

    def forward(
        self,
        plan: Any,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attend: q [T, Hq, D] -> out [T, Hq, D].

        lse [T, Hq] float32 takes the natural log-sum-exp; `new` is this step's (k, v) [T, Hk, D], already written.
        """


def plan_on_device(backends: Iterable[AttentionBackend | type[AttentionBackend]]) -> bool:
    """Whether all of these say `plans_on_device`, which need not be there."""
    return all(getattr(backend, "plans_on_device", False) for backend in backends)
