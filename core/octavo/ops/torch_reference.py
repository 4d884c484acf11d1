"""The fused operators in plain torch: the reference, and what serves where no kernel does."""

import torch
import torch.nn.functional as F

from octavo.kv_cache.interface import KVCache, KVCacheFormat
from octavo.memo import StepMemo
from octavo.ops.interface import OPS, OpSpec


class TorchOps:
    """All ops on any device and dtype. Rotary and norms round once, from float32, where the input is narrower."""

    ops = frozenset(OPS)
    features: frozenset[str] = frozenset()

    @staticmethod
    def why_not(spec: OpSpec, options: object) -> str | None:
        """Torch serves every op that the core knows."""
        return None if spec.op in OPS else f"torch does not offer {spec.op}"

    def __init__(self, options: object = None) -> None:
        del options
        self._turns = StepMemo(_turns)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
        if x.dtype == weight.dtype:
            return torch.rms_norm(x, weight.shape, weight, eps)
        # Fewer and shorter calls than torch.rms_norm's own, which count where there are few tokens.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        normed: torch.Tensor = (x * scale).mul_(weight)
        return normed.to(weight.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        residual = residual.add_(x)
        return self.rms_norm(residual, weight, eps), residual

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu of the first half times the second."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rotary(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        """Rotate x [T, heads, D] in place."""
        cos, sin = self._turns(positions, cos_sin)
        values = x.float()
        x.copy_(values.roll(x.shape[-1] // 2, -1).mul_(sin).addcmul_(values, cos))

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
        """Rotary in place, then the write."""
        self.rotary(qk, positions, cos_sin)
        cache_format.write(kv, qk[:, num_heads:], v, slots)


def _turns(positions: torch.Tensor, cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, cos) and (-sin, sin) of each position, [T, 1, D]: what a head and its swapped halves are multiplied by."""
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
