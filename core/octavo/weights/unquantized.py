"""The unquantized weight format: one dense tensor a layer."""

from collections.abc import Mapping
from typing import Any, Self

import torch

from octavo.weights.canonical import Dense
from octavo.weights.interface import LinearShape, ParamSpec


def quantization_of(config: Mapping[str, Any]) -> Any:
    """What config.json says of a quantization, under its present key or its old one; None or empty: nothing."""
    return config.get("quantization_config") or config.get("compression_config")


class Unquantized:
    """`weight` [out, in] in any floating dtype."""

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims checkpoints whose config names no quantization."""
        return None if quantization_of(config) else cls()

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> Self | None:
        """Quantizes nothing."""
        return None

    def skips(self, module: str) -> bool:
        """Nothing is quantized, so nothing is skipped."""
        return False

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The weight alone."""
        return [ParamSpec(suffix="weight", shape=(shape.out_features, shape.in_features), output_axis=0, input_axis=1)]

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Dense:
        """The tensor in `dtype`."""
        return Dense(params["weight"].to(dtype))
