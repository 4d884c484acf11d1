"""Medians with confidence intervals, and percentiles."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median, and its 95% confidence interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        """The estimate in another unit; `factor` is above 0."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)


def median_estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """The median, with the percentile bootstrap's interval (Efron and Tibshirani 1993, §13.3)."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(sample, (_RESAMPLES, len(sample)))
    medians: npt.NDArray[np.float64] = np.median(drawn, axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Estimate(float(np.median(sample)), float(low), float(high))


def speedup_estimate(ours: Sequence[float], others: Sequence[float]) -> Estimate:
    """How many times quicker we are: the median of the ratios of neighbouring turns, which share their moment."""
    return median_estimate([other / our for our, other in zip(ours, others, strict=True)])


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile, interpolated; NaN of nothing."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), percent)) if values else float("nan")
