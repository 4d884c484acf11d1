"""The format `compressed-tensors`: each layer as the config group that targets it says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import GroupedInt, ScaledFloat8, ScaledInt8
from octavo.weights.interface import LinearShape, ParamSpec, WeightFormat

from octavo_quant_compressed_tensors.config import WHAT, Group, find_quantization, read_groups, read_names
from octavo_quant_compressed_tensors.packed import Packed
from octavo_quant_compressed_tensors.scaled import Scaled
from octavo_quant_compressed_tensors.targets import rank


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """Config groups, each targets with the scheme of their weights, and the modules that are left dense."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims checkpoints whose quant_method is "compressed-tensors". Raises CheckpointError."""
        quantization = find_quantization(config)
        if quantization is None:
            return None
        ignored = read_names(quantization, "ignore", WHAT) if quantization.get("ignore") else ()
        return cls(read_groups(quantization), ignored)

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> WeightFormat | None:
        """Quantizes nothing."""
        return None

    def skips(self, module: str) -> bool:
        """The modules that are ignored, that no group targets, or whose group leaves weights dense."""
        return self._scheme(module) is None

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The tensors that the layer's scheme stores. Raises CheckpointError."""
        return self._required(shape).params(shape)

    def weight(
        self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> GroupedInt | ScaledFloat8 | ScaledInt8:
        """The weight as the layer's scheme reads it. Raises CheckpointError."""
        return self._required(shape).weight(shape, params)

    def _required(self, shape: LinearShape) -> Packed | Scaled:
        scheme = self._scheme(shape.name)
        if scheme is None:
            raise CheckpointError(
                f"{shape.name} is stored quantized, but config.json's ignore and config_groups leave it dense."
            )
        return scheme

    def _scheme(self, module: str) -> Packed | Scaled | None:
        """The scheme of the group that names the module most closely; of equals, the first."""
        if rank(module, self.ignored) is not None:
            return None
        ranks = [(rank(module, targets), index) for index, (targets, _) in enumerate(self.groups)]
        found = min(((how, index) for how, index in ranks if how is not None), default=None)
        return None if found is None else self.groups[found[1]][1]
