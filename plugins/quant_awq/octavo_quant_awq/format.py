"""AWQ checkpoints (Lin et al. 2023) as AutoAWQ writes them: 4-bit integers, a scale and a zero point for each group."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import GroupedInt
from octavo.weights.interface import LinearShape, ParamSpec

from octavo_quant_awq.layouts import BITS, Gemm, Gemv, GemvFast, Layout

LAYOUTS: Mapping[str, type[Layout]] = {"gemm": Gemm, "gemv": Gemv, "gemv_fast": GemvFast}


class AWQ:
    """One checkpoint's settings. `group_size` -1 is one group a layer; `skipped` are parts of module names."""

    def __init__(self, version: str, group_size: int, skipped: Sequence[str], quantizes_head: bool) -> None:
        self.layout = LAYOUTS[version]
        self.group_size = group_size
        self.skipped = tuple(skipped)
        self.quantizes_head = quantizes_head

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims quant_method awq, and what AutoAWQ wrote before it named one. Raises CheckpointError."""
        settings = config.get("quantization_config")
        if not isinstance(settings, Mapping) or not _is_awq(settings):
            return None
        bits = settings.get("w_bit", settings.get("bits"))
        if bits != BITS:
            raise CheckpointError(f"The AWQ checkpoint has {bits!r} bits, but AWQ's versions store {BITS}.")
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if version not in LAYOUTS:
            raise CheckpointError(
                f"The AWQ checkpoint has the version {version!r}, but only {', '.join(LAYOUTS)} are read: save it in "
                "one of these."
            )
        group_size = settings.get("q_group_size", settings.get("group_size"))
        if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
            raise CheckpointError(
                f"The AWQ checkpoint has the group size {group_size!r}, but it must be a positive number of inputs, or "
                "-1 for all of them."
            )
        return cls(version, group_size, _names(settings), settings.get("lm_head") is True)

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> Self | None:
        """Never: AWQ needs calibration data."""
        return None

    def skips(self, module: str) -> bool:
        """Modules with an entry of modules_to_not_convert in their name, and lm_head unless the config quantizes it."""
        if module.rpartition(".")[2] == "lm_head" and not self.quantizes_head:
            return True
        return any(part in module for part in self.skipped)

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """qweight, qzeros and scales, as the version lays them. Raises CheckpointError."""
        return self.layout.params(shape, self._group_size(shape))

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> GroupedInt:
        """The canonical weight, its scales in the dtype that they are stored in."""
        return self.layout.weight(shape, self._group_size(shape), params)

    def _group_size(self, shape: LinearShape) -> int:
        return shape.in_features if self.group_size == -1 else self.group_size


def _is_awq(settings: Mapping[str, Any]) -> bool:
    """quant_config.json named no method; `zero_point` stands in AWQ's alone."""
    method = settings.get("quant_method")
    return method == "awq" if method is not None else "zero_point" in settings


def _names(settings: Mapping[str, Any]) -> list[str]:
    names = settings.get("modules_to_not_convert") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(
            f"The AWQ checkpoint's modules_to_not_convert is {names!r}, but must be a list of module names."
        )
    return names
