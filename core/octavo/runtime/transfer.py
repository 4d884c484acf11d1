"""Small copies between host and device that nobody waits for.

On a GPU they go through pinned memory: torch's pinned allocator reuses a block only once the copy that used it is done,
so that two steps in flight never overwrite each other's.
"""

from dataclasses import dataclass
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


Size = tuple[int, int]
"""The length of an array and the bytes of an element: 4 (int32) or 8 (int64)."""

_LAYOUTS = 512  # that are remembered: making the views of one takes as long as the rest of a copy
_TURNS = 3  # of the host's side on a GPU, so that it hardly ever waits for a copy to be done


@dataclass(frozen=True, slots=True)
class _Layout:
    """Arrays of certain sizes: on the host in each turn, all that is copied of it, and on the device."""

    arrays: list[list[Array]]
    sources: list[torch.Tensor]
    target: torch.Tensor
    views: list[torch.Tensor]


class Packet:
    """Many small arrays in one copy: they lie one after the other in persistent buffers on the host and the device.

    Arrays of the same sizes in the same order lie at the same addresses, which is what a CUDA graph needs.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        on_gpu = self._buffer.is_cuda
        self._hosts = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(_TURNS if on_gpu else 1)
        ]
        self._copied = [torch.cuda.Event() for _ in self._hosts if on_gpu]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._layouts: dict[tuple[Size, ...], _Layout] = {}
        self._open: _Layout | None = None

    def open(self, sizes: tuple[Size, ...]) -> list[Array]:
        """Arrays of these sizes for the caller to fill before `send`: what they hold is left over from others."""
        self._turn = (self._turn + 1) % len(self._hosts)
        if self._copied and not self._copied[self._turn].query():  # type: ignore[no-untyped-call]
            self._copied[self._turn].synchronize()
        self._open = self._layouts.get(sizes) or self._make_layout(sizes)
        return self._open.arrays[self._turn]

    def send(self) -> list[torch.Tensor]:
        """Copy the arrays. On a CPU the views are new ones: StepMemo tells steps apart by them."""
        layout = self._open
        assert layout is not None, "nothing has been opened"
        layout.target.copy_(layout.sources[self._turn], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
            return layout.views
        return [view.view(-1) for view in layout.views]

    def _make_layout(self, sizes: tuple[Size, ...]) -> _Layout:
        ends = list(accumulate(padded_bytes(number * item) for number, item in sizes))
        assert ends[-1] <= len(self._buffer), f"a packet of {ends[-1]} bytes, for a buffer of {len(self._buffer)}"
        starts = [0, *ends[:-1]]

        def views(buffer: torch.Tensor) -> list[torch.Tensor]:
            return [
                buffer[start : start + number * item].view(_DTYPES[item])
                for start, (number, item) in zip(starts, sizes, strict=True)
            ]

        layout = _Layout(
            [[view.numpy() for view in views(host)] for host in self._hosts],
            [host[: ends[-1]] for host in self._hosts],
            self._buffer[: ends[-1]],
            views(self._buffer),
        )
        if len(self._layouts) == _LAYOUTS:
            self._layouts.clear()
        self._layouts[sizes] = layout
        return layout


def padded_bytes(num_bytes: int) -> int:
    """What an array of `num_bytes` takes in a packet: every array is aligned as kernels like it."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


_ALIGNMENT = 16
_DTYPES = {4: torch.int32, 8: torch.int64}
