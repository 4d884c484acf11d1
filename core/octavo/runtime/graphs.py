"""CUDA graphs of the model's forward pass: one for each bucket of batch shapes, all in one memory pool."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.attention.interface import GraphSupport
from octavo.batch import BatchShape

# Mixed batches are padded to these: longer ones keep the GPU busy for longer than the host takes to launch them.
_MIXED_TOKENS = (*range(64, 512, 64), *range(512, 1025, 128))
_MIXED_REQUESTS = (32, 128, 256)


def decode_sizes(max_requests: int) -> list[int]:
    """Batch sizes of decode graphs: dense where padding would cost most, multiples of 16 and of 32 further on."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, *range(48, 256, 16), *range(256, max_requests, 32), max_requests]
    return sorted({size for size in sizes if size <= max_requests})


def mixed_shapes(max_requests: int, max_tokens: int) -> list[BatchShape]:
    """Shapes of graphs for batches in which prompts and decodes mix.

    All but one of their requests may be decodes; which ones are is for the kernels to see.
    """
    requests = [*(number for number in _MIXED_REQUESTS if number < max_requests), max_requests]
    tokens = [number for number in _MIXED_TOKENS if number <= max_tokens]
    # A batch has no more requests than tokens: what holds as many need not be larger.
    pairs = [(t, min(r, t)) for t in tokens for r in requests if r > 1]
    return [BatchShape(t, r, t, r - 1) for t, r in dict.fromkeys(pairs)]


class GraphShapes:
    """Which shapes have a graph, and which of them a batch fits best."""

    def __init__(self, support: GraphSupport, max_requests: int, max_tokens: int) -> None:
        self._decodes = decode_sizes(min(max_requests, max_tokens)) if support >= GraphSupport.DECODE else []
        self._mixed = mixed_shapes(max_requests, max_tokens) if support >= GraphSupport.MIXED else []

    def all(self) -> list[BatchShape]:
        """Every shape, those that need most memory first, so that the others fit into what they leave."""
        decodes = [BatchShape(n, n, 1, n) for n in self._decodes]
        return sorted(decodes + self._mixed, reverse=True)

    def find(self, shape: BatchShape) -> BatchShape | None:
        """The smallest shape that holds a batch of `shape`, or None."""
        if shape.num_decodes == shape.num_requests:
            at = bisect_left(self._decodes, shape.num_requests)
            size = self._decodes[at] if at < len(self._decodes) else None
            return None if size is None else BatchShape(size, size, 1, size)
        fitting = (s for s in self._mixed if s.num_tokens >= shape.num_tokens and s.num_requests >= shape.num_requests)
        return next(fitting, None)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    result: torch.Tensor


class Graphs:
    """Captured forward passes by shape. What a replay returns is overwritten by the next one of any shape."""

    def __init__(self, shapes: GraphShapes) -> None:
        self.shapes = shapes
        self._pool = torch.cuda.graph_pool_handle()
        self._forward: dict[BatchShape, _Captured] = {}
        self._greedy: dict[BatchShape, _Captured] = {}

    def capture(
        self, shape: BatchShape, forward: Callable[[], torch.Tensor], greedy: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Capture `forward` of the batch of `shape` in the buffers and, if all are decodes, `greedy` of its result.

        Each runs once before, to compile what it needs.
        """
        self._forward[shape] = captured = self._record(forward)
        if shape.num_decodes == shape.num_requests:
            self._greedy[shape] = self._record(lambda: greedy(captured.result))

    def _record(self, function: Callable[[], torch.Tensor]) -> _Captured:
        function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return _Captured(graph, result)

    def find(self, shape: BatchShape) -> BatchShape | None:
        """The shape whose graph serves a batch of `shape`, or None."""
        found = self.shapes.find(shape)
        return found if found in self._forward else None

    def replay(self, shape: BatchShape) -> torch.Tensor:
        """Hidden states [T, H] of the batch that lies in the buffers; those of padding are any numbers."""
        return _replay(self._forward[shape])

    def replay_greedy(self, shape: BatchShape) -> torch.Tensor:
        """The likeliest tokens [R] int64 after a batch of decodes whose graph was replayed last."""
        return _replay(self._greedy[shape])


def _replay(captured: _Captured) -> torch.Tensor:
    captured.graph.replay()
    return captured.result
