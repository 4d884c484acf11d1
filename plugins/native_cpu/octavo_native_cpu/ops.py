"""The fused operators' provider: addresses, sizes and strides in, one C call out."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from octavo.kv_cache.interface import KVCache, KVCacheFormat
from octavo.kv_cache.plain import LAYOUT
from octavo.ops.interface import OPS, OpSpec
from octavo.ops.torch_reference import TorchOps

from octavo_native_cpu.build import built

Function = Callable[..., None]
SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "float"}
MANY_ELEMENTS = 1 << 15  # from here on threads are worth waking, which takes about a microsecond

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rms_norm": [*[_P] * 3, *[_N] * 5, _F, _N],
    "add_rms_norm": [*[_P] * 4, *[_N] * 4, _F, _N],
    "silu_and_mul": [*[_P] * 2, *[_N] * 4],
    "rotary": [*[_P] * 3, *[_N] * 6],
    "rotary_and_write": [*[_P] * 7, *[_N] * 11],
}


def why_not_here(device_type: str, dtype: torch.dtype) -> str | None:
    """One sentence when there are no kernels for the device and dtype, or no compiler to make them, else None."""
    if device_type != "cpu":
        return f"native runs on a CPU, not on {device_type}"
    if dtype not in SUFFIXES:
        return f"native computes in bfloat16 and float32, not in {dtype}"
    return built().reason


def function(name: str, signature: list[Any]) -> Function:
    """A function of the compiled library, which why_not has found."""
    library = built().library
    assert library is not None, "why_not was not asked"
    found: Any = getattr(library, name)
    found.argtypes, found.restype = signature, None
    return found  # type: ignore[no-any-return]


class NativeOps:
    """All ops in bfloat16 and float32; the residual may be float32 beside bfloat16. Each gives torch's rounding."""

    ops = frozenset(OPS)
    features: frozenset[str] = frozenset()

    @staticmethod
    def why_not(spec: OpSpec, options: object) -> str | None:
        """Serves every op that the core knows on a CPU, once a C compiler has been found."""
        return why_not_here(spec.device.type, spec.dtype) if spec.op in OPS else f"native does not offer {spec.op}"

    def __init__(self, options: object = None) -> None:
        self.torch = TorchOps(options)
        self._rms_norm, self._add_rms_norm = (
            {
                (torch.bfloat16, torch.bfloat16): function(f"{op}_bf16", _SIGNATURES[op]),
                (torch.float32, torch.bfloat16): function(f"{op}_bf16_wide", _SIGNATURES[op]),
                (torch.float32, torch.float32): function(f"{op}_float", _SIGNATURES[op]),
            }
            for op in ("rms_norm", "add_rms_norm")
        )
        self._silu_and_mul, self._rotary, self._rotary_and_write = (
            {dtype: function(f"{op}_{suffix}", _SIGNATURES[op]) for dtype, suffix in SUFFIXES.items()}
            for op in ("silu_and_mul", "rotary", "rotary_and_write")
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis; x [T, H] or [T, heads, D], also a view."""
        width = x.shape[-1]
        if x.dim() > 3 or x.stride(-1) != 1:
            x = x.contiguous()
        rows = x if x.dim() == 3 else x.reshape(-1, 1, width)
        out = torch.empty(x.shape, dtype=weight.dtype)
        count, heads = rows.shape[0] * rows.shape[1], rows.shape[1]
        token_stride, head_stride, _ = rows.stride()
        self._rms_norm[x.dtype, weight.dtype](
            x.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            count,
            width,
            token_stride,
            heads,
            head_stride,
            eps,
            _threads(count * width),
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual), x and residual [T, H]; the sum is written into residual."""
        count, width = x.shape
        out = torch.empty((count, width), dtype=weight.dtype)
        self._add_rms_norm[residual.dtype, weight.dtype](
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            count,
            width,
            x.stride(0),
            residual.stride(0),
            eps,
            _threads(count * width),
        )
        return out, residual

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x[:, :I]) * x[:, I:], x [T, 2I] -> [T, I]."""
        count, width = x.shape
        out = torch.empty((count, width // 2), dtype=x.dtype)
        self._silu_and_mul[x.dtype](
            x.data_ptr(), out.data_ptr(), count, width // 2, x.stride(0), _threads(count * width)
        )
        return out

    def rotary(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
        """Rotate x [T, heads, D] in place by the float32 table cos_sin."""
        count, heads, head_dim = x.shape
        token_stride, head_stride, _ = x.stride()
        self._rotary[x.dtype](
            x.data_ptr(),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            count,
            heads,
            head_dim,
            token_stride,
            head_stride,
            _threads(x.numel()),
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
        """Rotary in place and the write, in one call where the cache is plain and of qk's dtype."""
        pages = kv.k
        if cache_format.layout != LAYOUT or pages.dtype != qk.dtype:
            self.rotary(qk, positions, cos_sin)
            cache_format.write(kv, qk[:, num_heads:], v, slots)
            return
        count, heads, head_dim = qk.shape
        token_stride, head_stride, _ = qk.stride()
        v_token_stride, v_head_stride, _ = v.stride()
        self._rotary_and_write[qk.dtype](
            qk.data_ptr(),
            v.data_ptr(),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            pages.data_ptr(),
            kv.v.data_ptr(),
            slots.data_ptr(),
            count,
            heads,
            num_heads,
            head_dim,
            pages.shape[2],
            token_stride,
            head_stride,
            v_token_stride,
            v_head_stride,
            pages.stride(0),
            _threads(count * heads * head_dim),
        )


def _threads(num_elements: int) -> int:
    return 1 if num_elements < MANY_ELEMENTS else torch.get_num_threads()
