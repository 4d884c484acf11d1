"""The reference matmul: torch's own linear, on any device."""

import torch
import torch.nn.functional as F

from octavo.weights.interface import Activation, ActivationSpec, Dense, MatmulSpec


class TorchMatmul:
    """Dense weights as they are."""

    handles = Dense
    layout = "dense"
    input = ActivationSpec()
    features: frozenset[str] = frozenset()

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Serves every dense weight."""
        return None if spec.weight is Dense else f"torch multiplies dense weights, not {spec.weight.__name__}"

    def __init__(self, options: object = None) -> None:
        del options
        # cuBLAS may split a product along K and, unless forbidden, adds the parts up in 16 bits.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def pack(self, weight: Dense) -> torch.Tensor:
        """The tensor itself."""
        return weight.weight

    def apply(
        self, x: Activation, packed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b."""
        if out is not None and out.dtype is torch.float32 and x.values.dtype.itemsize == 2 and out.is_cuda:
            torch.mm(x.values, packed.t(), out_dtype=torch.float32, out=out)
            return out if bias is None else out.add_(bias)
        result = F.linear(x.values, packed, bias)
        return result if out is None else out.copy_(result)
