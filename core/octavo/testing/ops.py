"""Fused ops under test: inputs, float64 oracles, and the largest errors that rounding explains.

Sums are in float32 (unit 2^-24) and each result is rounded to its dtype once, or as often as the op's docstring says.
"""

from dataclasses import dataclass

import torch

_UNIT = 2.0**-24
_SLACK = 1.05  # of a bound: rounding a bound's own terms
_FLOAT32_TINY = torch.finfo(torch.float32).smallest_normal  # numbers below may be flushed to zero


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is right in float64, and the largest error of each element."""

    value: torch.Tensor
    tolerance: torch.Tensor


def rounded(value: torch.Tensor, relative: torch.Tensor | float, dtype: torch.dtype, roundings: int = 1) -> Wanted:
    """A result that errs by `relative` before it is rounded `roundings` times to `dtype`."""
    info = torch.finfo(dtype)
    least = max(info.smallest_normal * info.eps, _FLOAT32_TINY)
    size = value.abs()
    return Wanted(value, _SLACK * (roundings * info.eps / 2 * size + relative * size) + least)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Wanted:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, eq. 4), in the weight's dtype.

    A sum of H squares errs by at most H units relative (Higham 2002, eq. 3.5), its root by half of that.
    """
    wide = x.double()
    value = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return rounded(value, (x.shape[-1] / 2 + 6) * _UNIT, weight.dtype)


def added(x: torch.Tensor, residual: torch.Tensor) -> Wanted:
    """x + residual, in the residual's dtype."""
    return rounded(x.double() + residual.double(), _UNIT, residual.dtype)


def silu_and_mul(x: torch.Tensor) -> Wanted:
    """silu of the first half times the second. silu may be rounded before the product is.

    exp errs by its argument's size in units, since that is what the argument's own rounding does.
    """
    gate, up = x.double().chunk(2, dim=-1)
    wanted = rounded(gate * torch.sigmoid(gate) * up, (gate.abs() + 8) * _UNIT, x.dtype, roundings=2)
    info = torch.finfo(x.dtype)
    least = max(info.smallest_normal * info.eps, _FLOAT32_TINY)  # what silu loses where it or exp leaves the range
    return Wanted(wanted.value, wanted.tolerance + least * (1 + gate.abs()) * up.abs())


def rotary(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> Wanted:
    """x [T, heads, D] turned: each pair (x[i], x[i + D/2]) is a complex number times e^(i angle) (Su et al. 2021, 34).

    Errors are relative to the two products' sizes, which may cancel.
    """
    cos, sin = cos_sin[positions.long()].double().unsqueeze(1).chunk(2, dim=-1)
    first, second = x.double().chunk(2, dim=-1)
    value = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    sizes = torch.cat(((first * cos).abs() + (second * sin).abs(), (second * cos).abs() + (first * sin).abs()), dim=-1)
    wanted = rounded(value, 0.0, x.dtype)
    return Wanted(value, wanted.tolerance + 4 * _UNIT * sizes)


def rotary_table(length: int, head_dim: int, theta: float = 10000.0) -> torch.Tensor:
    """cos_sin [length, head_dim]: cosines, then sines, of each position's angles, in float32."""
    exponents = torch.arange(0, head_dim, 2).double() / head_dim
    angles = torch.arange(length).double().outer(theta**-exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def error(got: torch.Tensor, wanted: Wanted) -> torch.Tensor:
    """Each element's error in units of its tolerance; NaN where the result is."""
    return (got.to(wanted.value.device).double() - wanted.value).abs() / wanted.tolerance


def assert_near(got: torch.Tensor, wanted: Wanted, what: str) -> None:
    """Raise AssertionError naming the worst element where the result errs more than rounding explains."""
    assert got.shape == wanted.value.shape, f"{what} has shape {tuple(got.shape)}, not {tuple(wanted.value.shape)}"
    errors = error(got, wanted)
    if errors.numel() and not errors.max() <= 1:  # NaN counts as wrong
        at = tuple(int(i) for i in torch.unravel_index(errors.nan_to_num(torch.inf).argmax(), errors.shape))
        raise AssertionError(
            f"{what} is {got[at]:.8g} at {at}, but {wanted.value[at]:.8g} is right within {wanted.tolerance[at]:.2g};"
            f" {int((~(errors <= 1)).sum())} of {errors.numel()} elements are wrong."
        )
