"""A CPU matmul on oneDNN with weights reordered once, for AVX512-BF16 and AMX.

Torch's own linear hands oneDNN a plain weight, which it reorders on every call: with few tokens that costs as much as
the product. A weight in oneDNN's blocked layout is read once.
"""

import torch
from octavo.weights.canonical import Dense
from octavo.weights.interface import Activation, ActivationSpec, MatmulSpec

_TYPICAL_TOKENS = 1  # the layout is chosen for decoding, and measured no worse for prefill


def _supported() -> bool:
    mkldnn = torch.ops.mkldnn
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and all(hasattr(mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))


class OneDNNMatmul:
    """Dense bfloat16 weights on a CPU."""

    handles: tuple[type, ...] = (Dense,)
    layout = "onednn"
    input = ActivationSpec()
    features: frozenset[str] = frozenset()

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Serves dense bfloat16 weights on CPUs whose oneDNN has bfloat16 products."""
        if spec.device.type != "cpu":
            return f"onednn runs on a CPU, not on {spec.device.type}"
        if spec.weight is not Dense or spec.dtype is not torch.bfloat16:
            return f"onednn multiplies dense bfloat16 weights, not {spec.weight.__name__} in {spec.dtype}"
        if not _supported() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this torch or CPU lacks oneDNN's bfloat16 products (AVX512-BF16 or AMX)"
        return None

    def __init__(self, options: object = None) -> None:
        del options
        self._linear = torch.ops.mkldnn._linear_pointwise.default  # found once: the search costs as much as a small op

    def pack(self, weight: Dense) -> torch.Tensor:
        """The weight in oneDNN's blocked layout."""
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.weight.contiguous(), _TYPICAL_TOKENS)
        return packed

    def apply(
        self, x: Activation, packed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b."""
        result: torch.Tensor = self._linear(x.values, packed, bias, "none", [], "")
        return result if out is None else out.copy_(result)
