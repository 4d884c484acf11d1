"""Contenders that take turns: the same work, cold caches, a sample of each in every round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.testing.ceilings import seconds_of
from octavo.testing.gpu import captured

COLD_BYTES = 256 << 20
"""Bytes between two uses of the same input on a GPU: several times its L2 cache."""

_MOST_COPIES = 256
_WARMUP_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """`launch(i)` does the work once on the i-th copy of its inputs; `graphs` says whether a CUDA graph may hold it."""

    name: str
    launch: Callable[[int], object]
    graphs: bool = False


def num_copies(device: str, num_bytes: int) -> int:
    """How many copies of inputs of `num_bytes` keep each one cold until it is used again; 1 on a CPU.

    At most 256: of inputs below 1 MiB, so, less than COLD_BYTES lie between two uses.
    """
    if device != "cuda":
        return 1
    return min(_MOST_COPIES, -(-COLD_BYTES // max(1, num_bytes)))


def time_in_turns(contenders: Sequence[Contender], copies: int, rounds: int, device: str) -> list[list[float]]:
    """Seconds of one launch: for each contender a sample a round, in an order that turns around each time."""
    turns = [_turn(one, copies, device) for one in contenders]
    samples: list[list[float]] = [[] for _ in contenders]
    for number in range(-_WARMUP_ROUNDS, rounds):
        order = list(range(len(turns)))
        for i in order if number % 2 else reversed(order):
            seconds = seconds_of(device, turns[i]) / copies
            if number >= 0:
                samples[i].append(seconds)
    return samples


def _turn(contender: Contender, copies: int, device: str) -> Callable[[], None]:
    """A launch on every copy; as one graph where that is possible, which leaves the host's part out."""

    def launches() -> None:
        for i in range(copies):
            contender.launch(i)

    if device != "cuda" or not contender.graphs:
        return launches
    graph = captured(launches)
    return graph.replay
