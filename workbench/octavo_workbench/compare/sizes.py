"""Model shapes and batches by name: what is compared on."""

import random
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass

_MOST_RAGGED = 64
_LONGEST_RAGGED = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder that kernels depend on."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {
    one.name: one
    for one in (
        Shape("llama-8b", 4096, 14336, 32, 8, 128),
        Shape("llama-70b", 8192, 28672, 64, 8, 128),
        Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128),
    )
}


def shape(text: str) -> Shape:
    """A name in SHAPES, or HqxHkxD such as 32x8x128, whose hidden size is Hq D and intermediate size 3.5 times that."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = _sizes(text, 3)
    if sizes is None or sizes[0] % sizes[1]:
        raise ArgumentTypeError(
            f"{text!r} is no shape: known are {', '.join(SHAPES)}, and HEADSxKV_HEADSxHEAD_DIM, such as 32x8x128, "
            "with as many heads for each KV head"
        )
    hidden = sizes[0] * sizes[2]
    return Shape(text, hidden, 7 * hidden // 2, *sizes)


@dataclass(frozen=True, slots=True)
class NamedBatch:
    """A batch's name, and (query_len, seq_len) of each request, decodes first."""

    name: str
    requests: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the batch computes."""
        return sum(n for n, _ in self.requests)


def batches(text: str) -> list[NamedBatch]:
    """Batches with commas between them (`batch`)."""
    return [batch(part.strip()) for part in text.split(",")]


def batch(text: str) -> NamedBatch:
    """One batch: R requests that each decode a token at length L, or compute L tokens at once, or some of both.

    decode:RxL, prefill:RxL, mixed:RxL+RxL (decodes, then prompts), ragged or ragged:RxL (decodes of lengths from 1 to
    L, drawn once and for all).
    """
    kind, _, sizes = text.partition(":")
    found = _KINDS[kind](sizes) if kind in _KINDS else None
    if found is None:
        raise ArgumentTypeError(
            f"{text!r} is no batch: there are decode:RxL, prefill:RxL, mixed:RxL+RxL and ragged:RxL, such as "
            "decode:32x8192 for 32 requests that decode at a length of 8,192"
        )
    return NamedBatch(text, tuple(found))


Requests = list[tuple[int, int]]


def _decode(text: str) -> Requests | None:
    sizes = _sizes(text, 2)
    return sizes and [(1, sizes[1])] * sizes[0]  # type: ignore[return-value]


def _prefill(text: str) -> Requests | None:
    sizes = _sizes(text, 2)
    return sizes and [(sizes[1], sizes[1])] * sizes[0]  # type: ignore[return-value]


def _mixed(text: str) -> Requests | None:
    first, _, second = text.partition("+")
    decodes, prompts = _decode(first), _prefill(second)
    return decodes + prompts if decodes and prompts else None


def _ragged(text: str) -> Requests | None:
    sizes = _sizes(text, 2) if text else [_MOST_RAGGED, _LONGEST_RAGGED]
    if sizes is None:
        return None
    rng = random.Random(0)
    return [(1, rng.randint(1, sizes[1])) for _ in range(sizes[0])]


_KINDS: dict[str, Callable[[str], Requests | None]] = {
    "decode": _decode,
    "prefill": _prefill,
    "mixed": _mixed,
    "ragged": _ragged,
}


def _sizes(text: str, count: int) -> list[int] | None:
    parts = text.split("x")
    good = len(parts) == count and all(part.isdecimal() and int(part) > 0 for part in parts)
    return [int(part) for part in parts] if good else None
