"""Small copies between host and device that nobody waits for.

On a GPU they go through pinned memory: torch's pinned allocator reuses a block only once the copy that used it is done,
so that two steps in flight never overwrite each other's.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


def to_device(values: Array, device: torch.device) -> torch.Tensor:
    """A device tensor of the array's shape and dtype, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def ints_to_device(values: list[int], device: torch.device) -> torch.Tensor:
    """A device tensor [len(values)] int64."""
    return to_device(np.array(values, dtype=np.int64), device)


class Arrival:
    """Device tensors on their way to the host; `tensors` waits for them."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def tensors(self) -> list[torch.Tensor]:
        """The tensors, on the host."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors


_Layout = tuple[list[slice], torch.Tensor, list[torch.Tensor]]
_LAYOUTS = 512  # that are remembered: making the views of one takes as long as the rest of a copy


class Packet:
    """Many small arrays in one copy: they lie one after the other in a persistent device buffer.

    Arrays of the same sizes in the same order lie at the same addresses, which is what a CUDA graph needs.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._layouts: dict[tuple[tuple[int, int], ...], _Layout] = {}

    def send(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """Copy the arrays (int32 or int64), and return them as new views of the buffer: StepMemo tells steps apart."""
        parts, target, views = self._layout(tuple((array.nbytes, array.itemsize) for array in arrays))
        host = torch.empty(target.shape, dtype=torch.uint8, pin_memory=self._buffer.is_cuda)
        flat = host.numpy()
        for array, part in zip(arrays, parts, strict=True):
            flat[part] = array.view(np.uint8)
        target.copy_(host, non_blocking=True)
        return [view.view(-1) for view in views]

    def _layout(self, sizes: tuple[tuple[int, int], ...]) -> _Layout:
        if sizes not in self._layouts:
            if len(self._layouts) == _LAYOUTS:
                self._layouts.clear()
            self._layouts[sizes] = self._make_layout(sizes)
        return self._layouts[sizes]

    def _make_layout(self, sizes: tuple[tuple[int, int], ...]) -> _Layout:
        """Where arrays of these (bytes, bytes an element) lie, and the buffer's views of them."""
        ends = list(accumulate(padded_bytes(size) for size, _ in sizes))
        assert ends[-1] <= len(self._buffer), f"a packet of {ends[-1]} bytes, for a buffer of {len(self._buffer)}"
        parts = [
            slice(end - padded_bytes(size), end - padded_bytes(size) + size)
            for (size, _), end in zip(sizes, ends, strict=True)
        ]
        views = [self._buffer[part].view(_DTYPES[item]) for part, (_, item) in zip(parts, sizes, strict=True)]
        return parts, self._buffer[: ends[-1]], views


def padded_bytes(num_bytes: int) -> int:
    """What an array of `num_bytes` takes in a packet: every array is aligned as kernels like it."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


_ALIGNMENT = 16
_DTYPES = {4: torch.int32, 8: torch.int64}
