"""What this device reaches at best, measured: the ceilings that shares are given of."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

_RUNS = 10
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes per second of a device-to-device copy, read and written ones counted; operations per second of a matmul."""

    bytes_per_s: float
    flops_per_s: float
    dtype: str

    def __str__(self) -> str:
        return f"copy {self.bytes_per_s / 1e9:,.1f} GB/s, {self.dtype} matmul {self.flops_per_s / 1e12:,.2f} TFLOP/s"


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Medians of ten copies of 1 GiB (128 MiB on a CPU) and ten square products of 8,192 (1,024) in `dtype`."""
    ceilings = Ceilings(_copy_rate(device), _matmul_rate(device, dtype), str(dtype).removeprefix("torch."))
    if device == "cuda":
        torch.cuda.empty_cache()  # the engine counts free memory when it starts
    return ceilings


def _copy_rate(device: str) -> float:
    source = torch.ones(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(device, lambda: target.copy_(source))


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    size = _MATMUL_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, dtype=dtype, device=device)
    return 2 * size**3 / _seconds(device, lambda: torch.mm(a, b, out=product))


def _seconds(device: str, work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    return median(seconds_of(device, work) for _ in range(_RUNS))


def seconds_of(device: str, work: Callable[[], object]) -> float:
    """Seconds that `work` takes on the device: between two events on a GPU, by the clock on a CPU."""
    if device != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
