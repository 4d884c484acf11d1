"""Matmuls made of others: factories over factories, and matmuls themselves."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from octavo.weights.interface import Activation, ActivationSpec, Matmul, MatmulSpec

MaxTokens = int | Callable[[Any], int]


def by_tokens(
    small: type[Any],
    large: type[Any],
    threshold: MaxTokens,
    small_options: Any = None,
    large_options: Any = None,
) -> type[Matmul]:
    """A matmul that gives up to `threshold` tokens to `small` and more to `large`, each with its own options.

    `threshold` is a number, or a function of the packed weight for one that depends on the shape. `small` packs for
    both. Built as any matmul, `Matmul(options)`; its own options are not looked at. It handles what both handle. Raises
    ValueError for two that differ in their layout or input, or that handle no weight in common.
    """
    handles = tuple(one for one in small.handles if one in large.handles)
    if not handles:
        raise ValueError(
            f"by_tokens joins matmuls of one weight, but {small.__name__} and {large.__name__} share none."
        )
    for member in ("layout", "input"):
        one, other = getattr(small, member), getattr(large, member)
        if one != other:
            raise ValueError(
                f"by_tokens joins matmuls of one {member}, but {small.__name__}'s is {one} and {large.__name__}'s is "
                f"{other}."
            )
    members = {
        "parts": ((small, small_options), (large, large_options)),
        "threshold": staticmethod(threshold if callable(threshold) else lambda packed: threshold),
        "handles": handles,
        "layout": small.layout,
        "input": small.input,
        "features": small.features & large.features,
    }
    return type("ByTokens", (_ByTokens,), members)


class _ByTokens:
    """The product of `by_tokens`: `parts` are the small and the large matmul's class, each with its options."""

    parts: ClassVar[tuple[tuple[Any, Any], tuple[Any, Any]]]
    threshold: ClassVar[Callable[[Any], int]]
    handles: tuple[type, ...]
    layout: str
    input: ActivationSpec
    features: frozenset[str]

    @classmethod
    def why_not(cls, spec: MatmulSpec, options: object) -> str | None:
        """The reasons of the parts that cannot serve."""
        (small, small_options), (large, large_options) = cls.parts
        reasons = (("few", small.why_not(spec, small_options)), ("many", large.why_not(spec, large_options)))
        return "; ".join(f"for {size} tokens: {reason}" for size, reason in reasons if reason is not None) or None

    def __init__(self, options: object = None) -> None:
        del options
        self.small, self.large = (part(own) for part, own in self.parts)

    def pack(self, weight: Any) -> Any:
        """The weight in the layout that both read."""
        return self.small.pack(weight)

    def apply(
        self, x: Activation, packed: Any, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, in] -> [T, out], by the part that T tokens call for."""
        few = x.values.shape[0] <= type(self).threshold(packed)
        result: torch.Tensor = (self.small if few else self.large).apply(x, packed, bias, out)
        return result
