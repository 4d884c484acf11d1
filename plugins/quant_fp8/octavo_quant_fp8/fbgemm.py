"""The format `fbgemm_fp8` of Llama 3.1's own FP8 checkpoints: a scale for each row of a weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from octavo.weights.canonical import ScaledFloat8
from octavo.weights.interface import LinearShape, ParamSpec, WeightFormat

from octavo_quant_fp8.skipped import is_skipped, read_skipped


@dataclass(frozen=True, slots=True)
class FbgemmFp8:
    """`weight` [out, in] in float8_e4m3fn, times `weight_scale` [out, 1].

    config.json's activation_scale_ub bounds what inputs are quantized with; they are not quantized here.
    """

    skipped: frozenset[str]

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims checkpoints whose quant_method is "fbgemm_fp8". Raises CheckpointError."""
        quantization = config.get("quantization_config")
        if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fbgemm_fp8":
            return None
        return cls(read_skipped(quantization))

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> WeightFormat | None:
        """Quantizes nothing: `fp8` does."""
        return None

    def skips(self, module: str) -> bool:
        """The modules that config.json lists, and lm_head."""
        return is_skipped(module, self.skipped)

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The codes and their scales."""
        size, scales = (shape.out_features, shape.in_features), (torch.float32, torch.bfloat16, torch.float16)
        return [
            ParamSpec(suffix="weight", shape=size, dtypes=(torch.float8_e4m3fn,), output_axis=0, input_axis=1),
            ParamSpec(suffix="weight_scale", shape=(size[0], 1), dtypes=scales, output_axis=0),
        ]

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledFloat8:
        """The codes as they are, their scales in float32."""
        scales = params["weight_scale"].float()
        return ScaledFloat8(codes=params["weight"], scales=scales, block=(1, shape.in_features))
