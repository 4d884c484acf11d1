"""The configurations that `tune` tries, by the number of tokens they serve."""

from octavo_matmul_triton.tuning import Config, TensorCore, Vector

SHAPES = {
    "q, k, v": (6144, 4096),
    "attention out": (4096, 4096),
    "gate, up": (28672, 4096),
    "down": (4096, 14336),
    "logits": (128256, 4096),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64)

# (block_n, block_k, warps, stages, swap) of tiles with 16 tokens, and with 32 or 64.
_NARROW = [
    (16, 128, 4, 6, False),
    (16, 256, 4, 4, False),
    (32, 128, 4, 5, False),
    (32, 256, 4, 4, False),
    (64, 128, 4, 4, False),
    (64, 64, 4, 6, True),
    (64, 128, 4, 4, True),
]
_WIDE = [
    (32, 64, 4, 6, False),
    (32, 128, 4, 4, False),
    (64, 64, 4, 5, False),
    (64, 128, 4, 4, False),
    (64, 64, 4, 5, True),
    (64, 128, 4, 4, True),
    (128, 64, 4, 4, True),
]


def candidates(tokens: int) -> list[Config]:
    """What to try for up to `tokens` tokens: the vector kernel for few, tensor cores for more."""
    if tokens <= 4:
        return _vectors(tokens)
    vectors: list[Config] = [Vector(rows, prefetch=ahead) for rows in (1, 2, 4) for ahead in (0, 4096)]
    return _tensor_cores(_NARROW if tokens <= 16 else _WIDE) + (vectors if tokens == 8 else [])


def _vectors(tokens: int) -> list[Config]:
    rows_tried = (2, 4, 8) if tokens == 1 else (1, 2, 4)
    return [
        Vector(rows, warps, unroll, ahead)
        for rows in rows_tried
        for warps in (2, 4)
        for unroll in ((1, 2) if tokens < 4 else (1,))  # four tokens' sums leave no registers for more
        for ahead in (0, 4096)
    ]


def _tensor_cores(tiles: list[tuple[int, int, int, int, bool]]) -> list[Config]:
    return [
        TensorCore(rows, depth, warps, stages, splits, swap, ahead)
        for rows, depth, warps, stages, swap in tiles
        for splits, ahead in ((1, 0), (1, 512), (2, 512), (4, 512))
    ]
