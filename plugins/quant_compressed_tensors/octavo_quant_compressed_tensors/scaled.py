"""Weights of one byte a code: FP8 (float-quantized) and 8-bit integers (int-quantized)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import ScaledFloat8, ScaledInt8
from octavo.weights.interface import LinearShape, ParamSpec

SCALES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Scaled:
    """`weight` [out, in] in float8_e4m3fn or int8, times `weight_scale`.

    A scale is that of `block` (rows, columns), where 0 stands for all of them: (0, 0) is the tensor, (1, 0) a row.
    `static` layers have a scale of their inputs too.
    """

    codes: torch.dtype
    block: tuple[int, int]
    static: bool

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The codes, their scales, and the inputs' scale of a static layer. Raises CheckpointError."""
        size = (shape.out_features, shape.in_features)
        specs = [
            ParamSpec(suffix="weight", shape=size, dtypes=(self.codes,), output_axis=0, input_axis=1),
            self._scales(shape),
        ]
        if self.static:
            specs.append(ParamSpec(suffix="input_scale", shape=(), dtypes=SCALES))
        return specs

    def _scales(self, shape: LinearShape) -> ParamSpec:
        rows, columns = self.block
        if not rows:
            return ParamSpec(suffix="weight_scale", shape=(), dtypes=SCALES)
        if rows == 1 and columns:
            require_whole_groups(shape, columns)
        return ParamSpec(
            suffix="weight_scale",
            shape=(-(-shape.out_features // rows), -(-shape.in_features // columns) if columns else 1),
            dtypes=SCALES,
            output_axis=0,
            input_axis=1 if columns else None,
            per_output=rows,
            per_input=columns or 1,
        )

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor]) -> ScaledFloat8 | ScaledInt8:
        """The codes as they are, their scales in float32."""
        scales = params["weight_scale"].float()
        rows, columns = self.block
        kind = ScaledInt8 if self.codes is torch.int8 else ScaledFloat8
        return kind(
            codes=params["weight"],
            scales=scales if rows else scales.view(1, 1),
            block=(rows or shape.out_features, columns or shape.in_features),
            input_scale=params["input_scale"].float() if self.static else None,
        )


def require_whole_groups(shape: LinearShape, group_size: int) -> None:
    """Raises CheckpointError where groups do not divide the layer's inputs."""
    if shape.in_features % group_size:
        raise CheckpointError(
            f"{shape.name} has {shape.in_features} inputs, which groups of {group_size} do not divide: quantize the "
            "model again with a group_size that does, or with the layer under ignore."
        )
