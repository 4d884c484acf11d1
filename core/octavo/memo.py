"""What all layers of a step ask alike is computed by the first of them."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class StepMemo(Generic[T]):
    """`function` of tensors, computed anew unless it is asked for the very tensors of the last call.

    A step's batch is made of new tensor objects, so nothing outlives its step; a caller that changes a tensor in place
    and asks again must pass another view of it. On a GPU nothing is kept: a graph must hold every computation.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = function
        self._key: tuple[torch.Tensor, ...] = ()
        self._result: T | None = None

    def __call__(self, *tensors: torch.Tensor) -> T:
        """The function's result."""
        key = self._key
        if len(key) == len(tensors) and all(a is b for a, b in zip(key, tensors, strict=True)):
            return self._result  # type: ignore[return-value]
        result = self._function(*tensors)
        if tensors[0].device.type == "cpu":
            self._key, self._result = tensors, result
        return result
