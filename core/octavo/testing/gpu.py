"""What tests and benchmarks do with a GPU: capture a graph, forbid waiting, count allocations."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `work`, which has run on another stream before, as torch's documentation asks."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Torch raises RuntimeError inside it when a call waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype and does not see all
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def num_allocations() -> int:
    """How often torch has allocated on the GPU so far, from the driver or from its own pool."""
    stats: dict[str, Any] = torch.cuda.memory_stats()
    return int(stats["allocation.all.allocated"])
