"""The reference matmul in torch: dense products, and on a GPU every canonical weight, dequantized at each call."""

from typing import Any

import torch
import torch.nn.functional as F

from octavo.weights.canonical import Dense, GroupedInt, ScaledFloat8, ScaledInt8
from octavo.weights.interface import Activation, ActivationSpec, MatmulSpec, Weight


class TorchMatmul:
    """Dense weights as they are, quantized ones in their canonical form.

    A dequantized copy of one layer lives for the time of its product, so that weights stay as small as they are stored.
    """

    handles: tuple[type, ...] = (Dense, GroupedInt, ScaledFloat8, ScaledInt8)
    layout = "dense"
    input = ActivationSpec()
    features = frozenset({"bits", "group_size", "zeros", "mins", "group_of", "scales", "block", "input_scale", "e5m2"})

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Serves every dense weight, and quantized ones on a GPU."""
        if spec.weight is not Dense and spec.device.type == "cpu":
            return "on a CPU torch would dequantize the weight at every call, which takes longer than the product"
        return None

    def __init__(self, options: object = None) -> None:
        del options
        # cuBLAS may split a product along K and, unless forbidden, adds the parts up in 16 bits.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def pack(self, weight: Weight) -> Any:
        """A dense weight's tensor, another weight itself."""
        return weight.weight if isinstance(weight, Dense) else weight

    def apply(
        self, x: Activation, packed: Any, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b."""
        values = x.values
        weight = packed if isinstance(packed, torch.Tensor) else packed.dequantize().to(values.dtype)
        if out is not None and out.dtype is torch.float32 and values.dtype.itemsize == 2 and out.is_cuda:
            torch.mm(values, weight.t(), out_dtype=torch.float32, out=out)
            return out if bias is None else out.add_(bias)
        result = F.linear(values, weight, bias)
        return result if out is None else out.copy_(result)
