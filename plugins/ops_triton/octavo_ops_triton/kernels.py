"""The Triton kernels: one launch an op, float32 inside, rounded as the torch reference rounds.

With PDL (programmatic dependent launch, sm_90) a kernel starts while its predecessor still runs. The law of the chain:
every program calls gdc_wait before it touches what another kernel writes or reads; only weights are read earlier.
No argument depends on the number of tokens, save `num_rows`, which is not specialised: a new number compiles nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _join_chain(PDL: tl.constexpr) -> None:
    """Let the next kernel start, then wait for the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _normed(x: tl.tensor, weight: tl.tensor, eps: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """Zhang and Sennrich 2019, eq. 4; x [ROWS, BLOCK] float32 with zeros past WIDTH."""
    mean_square = tl.sum(x * x, axis=1) / WIDTH
    return x * tl.rsqrt(mean_square + eps)[:, None] * weight


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    eps: float,
    num_rows: int,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Norm the rows (token, head) of x [T, HEADS, WIDTH] by strides into a contiguous out; ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    gains = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    _join_chain(PDL)
    mask = (row < num_rows)[:, None] & (column < WIDTH)
    start = (row // HEADS) * token_stride + (row % HEADS) * head_stride
    values = tl.load(x + start[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    normed = _normed(values, gains, eps, WIDTH)
    tl.store(out + row[:, None] * WIDTH + column, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def add_rms_norm(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: float,
    num_rows: int,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """residual += x, rounded to the residual's dtype; out = the norm of that; ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    gains = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    _join_chain(PDL)
    mask = (row < num_rows)[:, None] & (column < WIDTH)
    place = residual + row[:, None] * residual_stride + column
    added = tl.load(x + row[:, None] * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    total = (tl.load(place, mask=mask, other=0.0).to(tl.float32) + added).to(residual.dtype.element_ty)
    tl.store(place, total, mask=mask)
    normed = _normed(total.to(tl.float32), gains, eps, WIDTH)
    tl.store(out + row[:, None] * WIDTH + column, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def silu_and_mul(
    x: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A chunk of a row: silu of x's first half, rounded, times the second half."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    _join_chain(PDL)
    gate = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + width + column, mask=mask, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (silu * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _turned(
    place: tl.tensor, table: tl.tensor, column: tl.tensor, mask: tl.tensor, HALF: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The pairs (place[i], place[i + HALF]) turned by the table row's angles (Su et al. 2021, eq. 34)."""
    cos = tl.load(table + column, mask=column < HALF, other=0.0)
    sin = tl.load(table + HALF + column, mask=column < HALF, other=0.0)
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def rotary(
    x: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Turn GROUP heads of one token in place."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < HEADS) & (column < HALF)
    _join_chain(PDL)
    table = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF)
    place = x + token * token_stride + head * head_stride + column
    first, second = _turned(place, table, column, mask, HALF)
    tl.store(place, first.to(x.dtype.element_ty), mask=mask)
    tl.store(place + HALF, second.to(x.dtype.element_ty), mask=mask)


@triton.jit
def rotary_and_write(
    qk: tl.tensor,
    v: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slots: tl.tensor,
    qk_stride: tl.tensor,
    qk_head_stride: tl.tensor,
    v_stride: tl.tensor,
    v_head_stride: tl.tensor,
    block_stride: tl.tensor,
    cache_head_stride: tl.tensor,
    slot_stride: tl.tensor,
    QUERY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Turn GROUP heads of one token in place; those that are keys are also written, and their values with them."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * GROUP + tl.arange(0, GROUP))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < HEADS) & (column < HALF)
    _join_chain(PDL)
    slot = tl.load(slots + token)
    table = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF)
    place = qk + token * qk_stride + head * qk_head_stride + column
    first, second = _turned(place, table, column, mask, HALF)
    first, second = first.to(qk.dtype.element_ty), second.to(qk.dtype.element_ty)
    tl.store(place, first, mask=mask)
    tl.store(place + HALF, second, mask=mask)
    if (tl.program_id(1) * GROUP + GROUP > QUERY_HEADS) & (slot >= 0):
        key = head - QUERY_HEADS
        mask = mask & (key >= 0)
        value = v + token * v_stride + key * v_head_stride + column
        target = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * slot_stride
        target += key * cache_head_stride + column
        tl.store(k_cache + target, first, mask=mask)
        tl.store(k_cache + target + HALF, second, mask=mask)
        tl.store(v_cache + target, tl.load(value, mask=mask), mask=mask)
        tl.store(v_cache + target + HALF, tl.load(value + HALF, mask=mask), mask=mask)
