"""Dense checkpoints quantized to 8-bit integers as they are loaded."""

from collections.abc import Mapping

import torch
from octavo.weights.canonical import ScaledInt8
from octavo.weights.interface import LinearShape
from octavo.weights.online import OnlineByRow


class Int8(OnlineByRow):
    """int8, symmetric; checkpoints of 8-bit integers have formats of other names."""

    largest = 127.0

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledInt8:
        """The weight rounded to the nearest codes, ties to even. Raises CheckpointError where it is not finite."""
        values, scales = self.scaled(shape, params)
        codes = values.round_().clamp_(-self.largest, self.largest).to(torch.int8)
        return ScaledInt8(codes=codes, scales=scales, block=(1, shape.in_features))
