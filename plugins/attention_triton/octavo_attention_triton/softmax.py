"""The loop of both kernels: online softmax over tiles of paged keys (Milakov and Gimelshein 2018, in base 2)."""
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl

from octavo_attention_triton.chain import await_chain

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_SCORE = tl.constexpr(-1e30)  # finite, so that a row without keys yet needs no care: exp2(NO_SCORE - NO_SCORE) is 1


@triton.jit
def elements_of(num_pieces: tl.tensor, pointer: tl.tensor) -> tl.tensor:
    """Elements in pieces of 16 bytes: strides in these units tell the compiler how they are aligned (contract C9)."""
    return num_pieces * (128 // pointer.dtype.element_ty.primitive_bitwidth)


@triton.jit
def start_rows(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state of rows that have seen no key: sums [M, D], running maximum and denominator [M], all float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return acc, tl.full((BLOCK_M,), NO_SCORE, tl.float32), tl.zeros((BLOCK_M,), tl.float32)


@triton.jit
def finish_rows(acc: tl.tensor, top: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Outputs [M, D] and natural log-sum-exps [M] of the state; rows without keys give 0 and -inf."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    return acc / total[:, None], tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)


@triton.jit
def _load_ids(table_row: tl.tensor, keys: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr) -> tl.tensor:
    return tl.load(table_row + keys // BLOCK_SIZE, mask=keys < end, other=0)


@triton.jit
def _load_tile(
    head: tl.tensor,
    ids: tl.tensor,
    keys: tl.tensor,
    loaded: tl.tensor,
    STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Keys or values [N, D] of one head from their blocks: 0 where `loaded` is false, since any bits may lie there."""
    dims = tl.arange(0, BLOCK_D)
    rows = ids.to(tl.int64) * STRIDES[0] + (keys % BLOCK_SIZE) * STRIDES[2]
    places = head + rows[:, None] + dims[None, :]
    if MASKED and HEAD_DIM != BLOCK_D:
        return tl.load(places, mask=loaded[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(places, mask=loaded[:, None], other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(places, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(places)


@triton.jit
def _bounded(scores: tl.tensor, factor: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """tanh(scores * factor / SOFTCAP), from exp2 alone."""
    return 1 - 2 / (tl.exp2(scores * (factor * (2 * LOG2E / SOFTCAP))) + 1)


@triton.jit
def _weigh(
    scores: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    keys: tl.tensor,
    positions: tl.tensor,
    factor: tl.tensor,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Weights [M, N] of a tile of products, by how much earlier sums shrink, and the new maximum and denominator.

    Maxima are rounded up to whole numbers: the weights are then rounded to 16 bits alike, whichever keys lie in a tile.
    """
    scale = factor * LOG2E
    if SOFTCAP > 0:
        scores = _bounded(scores, factor, SOFTCAP)
        scale = SOFTCAP * LOG2E
    if MASKED:
        seen = keys[None, :] <= positions[:, None]
        if WINDOW:
            seen &= keys[None, :] > positions[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.ceil(tl.max(scores, 1) * scale))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores * scale - new_top[:, None])
    return weights, shrink, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit
def attend_keys(
    q: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    k_head: tl.tensor,
    v_head: tl.tensor,
    table_row: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first: tl.tensor,
    limit: tl.tensor,
    positions: tl.tensor,
    factor: tl.tensor,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    q_at: tl.tensor | None = None,
    q_mask: tl.tensor | None = None,
    PDL: tl.constexpr = False,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take the keys from `begin` (a tile's start) to `end` into the state of rows q [M, D] at `positions` [M].

    `first` is the first row's position and `limit` one past the last's. Without MASKED every row sees every key.
    With `q_at` the rows are read there in the first turn, once the kernel before has ended. What the pipelined loop
    loads ahead of that turn is on its way by then: as many tiles as it has stages, at most.
    """
    offsets = tl.arange(0, BLOCK_N)
    ids = _load_ids(table_row, begin + offsets, end, BLOCK_SIZE)
    for start in range(begin, end, BLOCK_N):
        keys = start + offsets
        # A tile's block ids are loaded one tile ahead: its keys' addresses then wait for no load.
        next_ids = _load_ids(table_row, keys + BLOCK_N, end, BLOCK_SIZE)
        loaded = keys < limit
        if WINDOW:
            loaded &= keys > first - WINDOW
        k = _load_tile(k_head, ids, keys, loaded, K_STRIDES, BLOCK_SIZE, HEAD_DIM, BLOCK_D, MASKED)
        if q_at is not None:  # noqa: SIM102 (this is the compiler's condition, the next one the program's)
            if start == begin:
                await_chain(PDL)
                q = tl.load(q_at, mask=q_mask, other=0, volatile=True)  # volatile: it must not move before the wait
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        weights, shrink, top, total = _weigh(scores, top, total, keys, positions, factor, WINDOW, SOFTCAP, MASKED)
        v = _load_tile(v_head, ids, keys, loaded, V_STRIDES, BLOCK_SIZE, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
        ids = next_ids
    return acc, top, total


@triton.jit
def attend_own_keys(
    q: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    k_new: tl.tensor_descriptor,
    v_new: tl.tensor_descriptor,
    column: tl.tensor,
    shift: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    positions: tl.tensor,
    factor: tl.tensor,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """As `attend_keys` without masks, for keys of this step: key j of the head at `column` is row `shift` + j.

    `k_new` and `v_new` are [T, Hk D]. The copy engine (TMA) reads a tile at a time, so threads compute no addresses.
    """
    for start in range(begin, end, BLOCK_N):
        k = k_new.load([shift + start, column])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        weights, shrink, top, total = _weigh(scores, top, total, None, positions, factor, 0, SOFTCAP, False)
        v = v_new.load([shift + start, column])
        acc = tl.dot(weights.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, top, total
