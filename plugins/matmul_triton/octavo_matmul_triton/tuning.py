"""Which kernel serves how many tokens, and in which sizes: plain data that `python -m octavo_matmul_triton.tune` finds.

A rule maps numbers of tokens (1, 2, 4, ..., each for the numbers down to the one before) to configurations. Its largest
number is the most tokens that this plugin serves for the shape; cuBLAS serves more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Vector:
    """The kernel on CUDA cores: `block_n` outputs a program; `prefetch` elements of each row before its turn."""

    block_n: int
    num_warps: int = 4
    unroll: int = 1
    prefetch: int = 0


@dataclass(frozen=True, slots=True)
class TensorCore:
    """The kernel on tensor cores: tiles of block_n x block_k in `num_stages` buffers, K in `splits` parts.

    `swap` lets the weights be the product's taller operand; `prefetch` is as for Vector.
    """

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4
    splits: int = 1
    swap: bool = False
    prefetch: int = 512


Config = Vector | TensorCore
Rule = Mapping[int, Config]

_SPLIT = TensorCore(block_n=64, block_k=128, splits=4, swap=True)
_WHOLE = TensorCore(block_n=64, block_k=128, swap=True, prefetch=0)

# Major compute capability -> (out, in features) -> rule. Shapes that nobody measured go by `default_rule`.
PINNED: dict[int, dict[tuple[int, int], Rule]] = {
    9: {  # one H200: Llama-8B's q/k/v, attention output, gate and up, down, logits
        (6144, 4096): {
            1: Vector(block_n=8, unroll=2),
            2: Vector(block_n=4, unroll=2),
        },
        (4096, 4096): {
            1: Vector(block_n=2, unroll=2),
            2: Vector(block_n=4, unroll=2),
            **dict.fromkeys((4, 8, 16, 32), _SPLIT),
        },
        (28672, 4096): {
            1: Vector(block_n=4, num_warps=2, unroll=2),
            2: Vector(block_n=2, unroll=2),
            **dict.fromkeys((4, 8, 16, 32), _WHOLE),
            64: TensorCore(block_n=64, block_k=64, num_stages=5, swap=True),
        },
        (4096, 14336): {
            1: Vector(block_n=2, unroll=2),
            2: Vector(block_n=2, unroll=2),
            **dict.fromkeys((4, 8, 16, 32), _SPLIT),
            64: TensorCore(block_n=64, block_k=128, splits=2, swap=True),
        },
        (128256, 4096): {
            1: Vector(block_n=4, num_warps=2, unroll=2),
            2: Vector(block_n=2, unroll=2),
            **dict.fromkeys((4, 8, 16, 32), _WHOLE),
            64: TensorCore(block_n=128, block_k=64, swap=True, prefetch=0),
        },
    }
}


# Of narrow weights cuBLAS adds up each output in one go over K, as this kernel does: a token's bits are then the same
# whether it is computed alone or among others. (The vector kernel's are not, and deep models make that of every bit.)
_NARROW = 4096
_IN_ORDER: Rule = dict.fromkeys((1, 2), TensorCore(block_n=64, block_k=128, swap=True))


@lru_cache(maxsize=1024)
def rule_for(major: int, out_features: int, in_features: int, dtype: torch.dtype) -> Rule:
    """The rule for a weight [out, in]: the pinned one (16-bit weights), or one by size."""
    pinned = PINNED.get(major, {}).get((out_features, in_features))
    if dtype.itemsize != 2:
        return default_rule(out_features, in_features)
    if pinned is None and major >= 9 and in_features < _NARROW:
        return _IN_ORDER
    return pinned or default_rule(out_features, in_features)


def default_rule(out_features: int, in_features: int) -> Rule:
    """One or two tokens on CUDA cores, where a plain kernel was measured ahead of cuBLAS for each shape of Llama-8B."""
    block_n = next(rows for rows, least in ((8, 16384), (4, 4096), (2, 1024), (1, 0)) if out_features >= least)
    num_warps = 4 if in_features >= 1024 else 1
    return {tokens: Vector(min(block_n, 16 // tokens), num_warps, unroll=2 // tokens or 1) for tokens in (1, 2)}
