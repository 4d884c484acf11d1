"""What formats that quantize a dense checkpoint while it is loaded have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from octavo.errors import CheckpointError
from octavo.weights.interface import LinearShape, ParamSpec
from octavo.weights.unquantized import Unquantized

LOGITS = "lm_head"


class OnlineByRow:
    """Each linear layer but the logits' gets a scale for each row: its largest magnitude / `largest`, the largest code.

    A format is a subclass with `weight`, which rounds what `scaled` gives to codes.
    """

    largest: ClassVar[float]

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
        return Unquantized().params(shape)

    def scaled(self, shape: LinearShape, params: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight [out, in] over its scales [out, 1], in float32. Raises CheckpointError where it is not finite."""
        values = params["weight"].float()
        largest = values.abs().amax(1, keepdim=True)
        if not largest.isfinite().all():
            raise CheckpointError(
                f"{shape.name}.weight has values that are not finite, which no scale brings to codes."
            )
        scales = (largest / self.largest).clamp_(
            min=torch.finfo(torch.float32).tiny
        )  # a row of zeros has codes of zero
        return values / scales, scales
