"""The fused operators' interface. A provider offers some of OPS; each op is selected for itself."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache, KVCacheFormat

API = 1
OPS = ("rms_norm", "add_rms_norm", "silu_and_mul", "rotary", "rotary_and_write")


@dataclass(frozen=True, slots=True)
class OpSpec:
    """What an op is asked to serve. `features` maps each feature in use to its value; absent means off."""

    op: str
    dtype: torch.dtype
    device: DeviceInfo
    features: dict[str, Any] = field(default_factory=dict)


class FusedOps(Protocol):
    """Offers the ops in `ops`, each a method of that name. Built as `Ops(options)`."""

    ops: frozenset[str]
    features: frozenset[str]

    @staticmethod
    def why_not(spec: OpSpec, options: object) -> str | None:
        """One sentence when the op cannot be served, else None."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, eq. 4).

        The result is in the weight's dtype; x may be float32 beside a narrower weight.
        """

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual), x and residual [T, H]; residual may be overwritten.

        The residual may be float32 beside a narrower x, and stays what it is.
        """

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x[:, :I]) * x[:, I:], x [T, 2I] -> [T, I]."""

    def rotary(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        """Rotate x [T, heads, D] in place by positions [T] int32; cos_sin [max_len, D] = cos, then sin, of D/2 angles.

        Halves are rotated as pairs (x[i], x[i + D/2]): Su et al. 2021, eq. 34, in the order of the HF checkpoints.
        """

    def rotary_and_write(
        self,
        qk: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        num_heads: int,
        cache_format: KVCacheFormat,
        kv: KVCache,
        slots: torch.Tensor,
    ) -> None:
        """`rotary` of qk [T, Hq + Hk, D] in place, then the write of its last Hk heads and v [T, Hk, D] at `slots`."""
