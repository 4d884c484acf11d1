"""The format `fp8` of Hugging Face, DeepSeek and vLLM: a scale for each block of a weight, or for the tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import ScaledFloat8
from octavo.weights.interface import LinearShape, ParamSpec, WeightFormat

from octavo_quant_fp8.online import OnlineFp8
from octavo_quant_fp8.skipped import is_skipped, read_skipped

CODES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SCALES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = ("dynamic", "static")


@dataclass(frozen=True, slots=True)
class Fp8:
    """`weight` [out, in] in float8, times `weight_scale_inv`: a multiplier, whatever its name says.

    `block` is the (rows, columns) of a scale, ragged at the edges; None: the scale is the tensor's. `static` layers
    have a scale of their inputs too.
    """

    block: tuple[int, int] | None
    static: bool
    codes: torch.dtype
    skipped: frozenset[str]

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims checkpoints whose quant_method is "fp8". Raises CheckpointError."""
        quantization = config.get("quantization_config")
        if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
            return None
        scheme, fmt = quantization.get("activation_scheme", "dynamic"), quantization.get("fmt", "e4m3")
        if scheme not in SCHEMES:
            raise CheckpointError(
                f"The fp8 checkpoint's activation_scheme is {scheme!r}, but must be dynamic or static."
            )
        if not isinstance(fmt, str) or fmt not in CODES:
            raise CheckpointError(f"The fp8 checkpoint's fmt is {fmt!r}, but must be one of {', '.join(CODES)}.")
        return cls(_read_block(quantization), scheme == "static", CODES[fmt], read_skipped(quantization))

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> WeightFormat | None:
        """Quantizes dense checkpoints, by row."""
        return OnlineFp8.quantize(config)

    def skips(self, module: str) -> bool:
        """The modules that config.json lists, and lm_head."""
        return is_skipped(module, self.skipped)

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The codes, their scales, and the inputs' scale of a static layer."""
        size = (shape.out_features, shape.in_features)
        specs = [
            ParamSpec(suffix="weight", shape=size, dtypes=(self.codes,), output_axis=0, input_axis=1),
            self._scales(size),
        ]
        if self.static:
            specs.append(ParamSpec(suffix="input_scale", aliases=("activation_scale",), shape=(), dtypes=SCALES))
        return specs

    def _scales(self, size: tuple[int, int]) -> ParamSpec:
        if self.block is None:
            return ParamSpec(suffix="weight_scale_inv", aliases=("weight_scale",), shape=(), dtypes=SCALES)
        rows, columns = self.block
        return ParamSpec(
            suffix="weight_scale_inv",
            aliases=("weight_scale",),
            shape=(-(-size[0] // rows), -(-size[1] // columns)),
            dtypes=(*SCALES, torch.float8_e8m0fnu),
            output_axis=0,
            input_axis=1,
            per_output=rows,
            per_input=columns,
        )

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledFloat8:
        """The codes as they are, their scales in float32."""
        scales = params["weight_scale_inv"].float()
        return ScaledFloat8(
            codes=params["weight"],
            scales=scales.view(1, 1) if self.block is None else scales,
            block=self.block or (shape.out_features, shape.in_features),
            input_scale=params["input_scale"].float() if self.static else None,
        )


def _read_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(
            f"The fp8 checkpoint's weight_block_size is {block!r}, but must be null or two positive integers."
        )
    return (block[0], block[1])
