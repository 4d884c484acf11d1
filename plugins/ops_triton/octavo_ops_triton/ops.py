"""The fused operators' provider: shapes and strides in, one kernel launch out."""

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache, KVCacheFormat
from octavo.ops.interface import OPS, OpSpec

MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True, slots=True)
class Tuning:
    """Sizes of programs. `norm_elements` and `norm_rows_elements`: of a row a thread, and of all rows a program.

    `silu_block`: elements a program; `rotary_heads`: heads a program; `silu_warps`, `rotary_warps`: its warps.
    """

    norm_elements: int = 8
    norm_rows_elements: int = 1024
    silu_block: int = 1024
    silu_warps: int = 4
    rotary_heads: int = 16
    rotary_warps: int = 8


TUNING = Tuning()


def why_not_device(device: DeviceInfo) -> str | None:
    """One sentence when Triton cannot run on the device, else None."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton needs a GPU; on a CPU it runs only in its interpreter (TRITON_INTERPRET=1), for tests"
    if device.type not in ("cpu", "cuda"):
        return f"triton runs on NVIDIA GPUs, not on {device.type}"
    if device.type == "cuda" and device.capability < MIN_CAPABILITY:
        have = ".".join(map(str, device.capability))
        return f"triton needs compute capability 8.0, but {device.name} has {have}"
    return None if find_spec("triton") else "the package triton is not installed"


class TritonOps:
    """All ops, in place where the interface says so. Norm weights are read before the chain's wait: they are constant.

    A tensor's last stride is 1; other strides are free.
    """

    ops = frozenset(OPS)
    features: frozenset[str] = frozenset()

    @staticmethod
    def why_not(spec: OpSpec, options: object) -> str | None:
        """Serves every op that the core knows, on GPUs from sm_80 on and in Triton's interpreter."""
        return why_not_device(spec.device) if spec.op in OPS else f"triton does not offer {spec.op}"

    def __init__(self, options: object = None, tuning: Tuning = TUNING) -> None:
        from octavo_ops_triton import kernels  # not above: why_not answers where there is no triton

        del options
        self.kernels = kernels
        self.tuning = tuning
        self.launch = launch_arguments(kernels.silu_and_mul)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis; x [T, H] or [T, heads, D], also a view."""
        out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        width = x.shape[-1]
        if out.numel():
            if x.dim() > 3 or x.stride(-1) != 1:
                x = x.reshape(-1, width).contiguous()
            heads, head_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
            token_stride = x.stride(0) if x.dim() > 1 else 0
            num_rows = out.numel() // width
            block, rows, warps = self._norm_sizes(width)
            self.kernels.rms_norm[(-(-num_rows // rows),)](
                x,
                weight,
                out,
                token_stride,
                head_stride,
                eps,
                num_rows,
                heads,
                width,
                block,
                rows,
                num_warps=warps,
                **self.launch,
            )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual), x and residual [T, H]; the sum is written into residual."""
        out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        num_rows, width = x.shape
        if num_rows:
            block, rows, warps = self._norm_sizes(width)
            self.kernels.add_rms_norm[(-(-num_rows // rows),)](
                x,
                residual,
                weight,
                out,
                x.stride(0),
                residual.stride(0),
                eps,
                num_rows,
                width,
                block,
                rows,
                num_warps=warps,
                **self.launch,
            )
        return out, residual

    def _norm_sizes(self, width: int) -> tuple[int, int, int]:
        """(columns, rows, warps) of a program: short rows share one, long ones get more threads."""
        block = _power_of_two(width)
        rows = max(1, self.tuning.norm_rows_elements // block)
        return block, rows, max(1, min(16, rows * block // (32 * self.tuning.norm_elements)))

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x[:, :I]) * x[:, I:], x [T, 2I] -> [T, I]."""
        num_tokens, width = x.shape[0], x.shape[1] // 2
        out = torch.empty(num_tokens, width, dtype=x.dtype, device=x.device)
        if num_tokens:
            block, warps = self.tuning.silu_block, self.tuning.silu_warps
            grid = (num_tokens, -(-width // block))
            self.kernels.silu_and_mul[grid](x, out, x.stride(0), width, block, num_warps=warps, **self.launch)
        return out

    def rotary(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        """Rotate x [T, heads, D] in place by positions [T] int32; cos_sin [max_len, D] contiguous float32."""
        num_tokens, heads, head_dim = x.shape
        if num_tokens:
            half, group = head_dim // 2, self.tuning.rotary_heads
            self.kernels.rotary[(num_tokens, -(-heads // group))](
                x,
                positions,
                cos_sin,
                x.stride(0),
                x.stride(1),
                heads,
                half,
                _power_of_two(half),
                group,
                num_warps=self.tuning.rotary_warps,
                **self.launch,
            )

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
        """Rotate qk in place and write its last Hk heads and v at `slots`: one kernel for the plain layout.

        Another layout, or keys and values of unlike strides, are written by the cache format after the rotation.
        """
        if cache_format.layout != "plain" or kv.k.stride() != kv.v.stride():
            self.rotary(qk, positions, cos_sin)
            cache_format.write(kv, qk[:, num_heads:], v, slots)
            return
        num_tokens, heads, head_dim = qk.shape
        if num_tokens:
            half, group = head_dim // 2, self.tuning.rotary_heads
            self.kernels.rotary_and_write[(num_tokens, -(-heads // group))](
                qk,
                v,
                positions,
                cos_sin,
                kv.k,
                kv.v,
                slots,
                *qk.stride()[:2],
                *v.stride()[:2],
                *kv.k.stride()[:3],
                num_heads,
                heads,
                half,
                _power_of_two(half),
                group,
                kv.k.shape[2],
                num_warps=self.tuning.rotary_warps,
                **self.launch,
            )


def launch_arguments(kernel: object) -> dict[str, bool]:
    """PDL and the launch option that it needs, where kernels are compiled (not interpreted) for sm_90 or later."""
    from triton.runtime import JITFunction

    compiled = isinstance(kernel, JITFunction) and torch.cuda.is_available()
    if compiled and torch.cuda.get_device_capability() >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
