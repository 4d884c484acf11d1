"""Dense checkpoints quantized to FP8 as they are loaded."""

from collections.abc import Mapping

import torch
from octavo.weights.canonical import ScaledFloat8
from octavo.weights.interface import LinearShape
from octavo.weights.online import OnlineByRow


class OnlineFp8(OnlineByRow):
    """float8_e4m3fn."""

    largest = torch.finfo(torch.float8_e4m3fn).max

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledFloat8:
        """The weight rounded to the nearest codes, ties to even. Raises CheckpointError where it is not finite."""
        values, scales = self.scaled(shape, params)
        return ScaledFloat8(codes=values.to(torch.float8_e4m3fn), scales=scales, block=(1, shape.in_features))
