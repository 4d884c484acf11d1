"""Dense checkpoints quantized to 8-bit integers as they are loaded."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import ScaledInt8
from octavo.weights.interface import LinearShape, ParamSpec
from octavo.weights.unquantized import Unquantized

LOGITS = "lm_head"
LARGEST = 127


class Int8:
    """Each linear layer but the logits' in int8, with a scale for each row: its largest magnitude / 127."""

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims nothing: checkpoints of 8-bit integers have formats of other names."""
        return None

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> Self | None:
        """Quantizes dense checkpoints."""
        return cls() if Unquantized.claim(config) else None

    def skips(self, module: str) -> bool:
        """The logits stay dense."""
        return module == LOGITS

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The dense weight."""
        return [ParamSpec(suffix="weight", shape=(shape.out_features, shape.in_features), output_axis=0, input_axis=1)]

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledInt8:
        """The weight rounded to the nearest codes. Raises CheckpointError where it is not finite."""
        values = params["weight"].float()
        largest = values.abs().amax(1, keepdim=True)
        if not largest.isfinite().all():
            raise CheckpointError(f"{shape.name}.weight has values that are not finite, which integers cannot scale.")
        scales = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros has codes of zero
        codes = (values / scales).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return ScaledInt8(codes=codes, scales=scales, block=(1, shape.in_features))
