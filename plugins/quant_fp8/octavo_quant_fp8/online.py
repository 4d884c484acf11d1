"""Dense checkpoints quantized to FP8 as they are loaded."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import ScaledFloat8
from octavo.weights.interface import LinearShape, ParamSpec
from octavo.weights.unquantized import Unquantized

from octavo_quant_fp8.skipped import LOGITS

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class OnlineFp8:
    """Each linear layer but the logits' in float8_e4m3fn, with a scale for each row: its largest magnitude / 448."""

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims nothing: a checkpoint says when it is quantized."""
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

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledFloat8:
        """The weight rounded to the nearest codes. Raises CheckpointError where it is not finite."""
        values = params["weight"].float()
        largest = values.abs().amax(1, keepdim=True)
        if not largest.isfinite().all():
            raise CheckpointError(f"{shape.name}.weight has values that are not finite, which FP8 cannot scale.")
        scales = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros has codes of zero
        codes = (values / scales).to(torch.float8_e4m3fn)
        return ScaledFloat8(codes=codes, scales=scales, block=(1, shape.in_features))
