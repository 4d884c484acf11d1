"""The two kernels y = x W^T + b for few tokens: on CUDA cores, and on tensor cores with K split over programs.

Both are bound by reading W once. x and out are [num_tokens, K] and [num_tokens, num_outputs]; W [num_outputs, K] and x
are contiguous. Rows past the end are clamped to the last, so that only stores need masks.

With PDL (programmatic dependent launch, sm_90) a program first asks the L2 for the beginning of its weights, which are
constant, and then waits for the kernel before: the memory works while that one ends. The law of the chain: every
program calls gdc_wait before it touches anything else, partial sums and counters included.
"""

import triton
import triton.language as tl


@triton.jit
def _join_chain(
    weight: tl.tensor,
    first_row: tl.tensor,
    num_outputs: tl.tensor,
    first_k: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Let the next kernel start; ask for the first CHUNK elements of each row (0: none); wait for the kernel before.

    The threads of a warp issue bulk prefetches one after the other, so the rows are dealt out to all warps.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if CHUNK > 0:
            thread = tl.arange(0, THREADS)
            row = tl.minimum(first_row + thread // (THREADS // ROWS), num_outputs - 1).to(tl.int64)
            place = (weight + row * K + tl.minimum(first_k, K - CHUNK)).to(tl.int64)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.eq.s32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
                "=r,l,r,r",
                [place, CHUNK * weight.dtype.element_ty.primitive_bitwidth // 8, thread % (THREADS // ROWS)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.extra.cuda.gdc_wait()


@triton.jit(
    do_not_specialize=["num_tokens", "num_outputs", "has_bias", "out_stride"],
    do_not_specialize_on_alignment=["bias", "out"],
)
def vector_product(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_tokens: int,
    num_outputs: int,
    has_bias: int,
    out_stride: int,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """BLOCK_N outputs of up to TOKENS tokens, float32 sums.

    BLOCK_K is LANE elements (16 bytes) for each thread, so that a thread's part of x is the part that its weights
    meet, and sums stay in the thread until the end.
    """
    first_row = tl.program_id(0) * BLOCK_N
    _join_chain(weight, first_row, num_outputs, 0, K, BLOCK_N, CHUNK, BLOCK_K // LANE, PDL)
    row = first_row + tl.arange(0, BLOCK_N)
    weights = weight + tl.minimum(row, num_outputs - 1).to(tl.int64)[:, None] * K
    sums = (tl.zeros((BLOCK_N, BLOCK_K // LANE), tl.float32),) * TOKENS
    for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        k = start + tl.arange(0, BLOCK_K)
        if K % BLOCK_K == 0:
            w = tl.load(weights + k[None, :], eviction_policy="evict_first").to(tl.float32)
        else:
            w = tl.load(weights + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
        sums = _add_tile(sums, w, x, k, num_tokens, K, TOKENS, BLOCK_N, BLOCK_K, LANE)
    mask = row < num_outputs
    added = tl.load(bias + row, mask=mask & (has_bias != 0), other=0.0).to(tl.float32)
    for token in tl.static_range(TOKENS):
        total = tl.sum(sums[token], axis=1) + added
        place = out + tl.cast(token, tl.int64) * out_stride + row
        tl.store(place, total.to(out.dtype.element_ty), mask=mask & (token < num_tokens))


@triton.jit
def _add_tile(
    sums: tl.tuple,
    w: tl.tensor,
    x: tl.tensor,
    k: tl.tensor,
    num_tokens: tl.tensor,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANE: tl.constexpr,
) -> tl.tuple:
    """`sums` of each token with a tile of weights [BLOCK_N, BLOCK_K] added, each thread its own LANE elements."""
    added = tl.tuple([])
    for token in tl.static_range(TOKENS):
        row = x + tl.minimum(token, num_tokens - 1) * K
        if K % BLOCK_K == 0:
            values = tl.load(row + k).to(tl.float32)
        else:
            values = tl.load(row + k, mask=k < K, other=0.0).to(tl.float32)
        products = tl.reshape(w * values[None, :], (BLOCK_N, BLOCK_K // LANE, LANE))
        added = added + tl.tuple([sums[token] + tl.sum(products, axis=2)])
    return added


@triton.jit(
    do_not_specialize=["num_tokens", "num_outputs", "has_bias", "out_stride"],
    do_not_specialize_on_alignment=["bias", "out"],
)
def tensor_core_product(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partials: tl.tensor,
    counters: tl.tensor,
    num_tokens: int,
    num_outputs: int,
    has_bias: int,
    out_stride: int,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    CHUNK: tl.constexpr,
    THREADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """BLOCK_N outputs of up to BLOCK_M tokens over one of SPLITS parts of K; the last part to arrive adds them up.

    `partials` [SPLITS, BLOCK_M, num_outputs] float32 are added in the order of the parts, whoever adds them; `counters`
    are 0 before and after. SWAP computes W x^T, whose wider side is W's.
    """
    first_row, split = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    tiles: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    per_split: tl.constexpr = (tiles + SPLITS - 1) // SPLITS
    first_k = split * (per_split * BLOCK_K)
    _join_chain(weight, first_row, num_outputs, first_k, K, BLOCK_N, CHUNK, THREADS, PDL)
    n = first_row + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    weights = weight + tl.minimum(n, num_outputs - 1).to(tl.int64)[:, None] * K
    inputs = x + tl.minimum(m, num_tokens - 1)[:, None] * K
    sums = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(per_split):
        k = first_k + tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        if K % (BLOCK_K * SPLITS) == 0:
            w = tl.load(weights + k)
            values = tl.load(inputs + k)
        else:
            w = tl.load(weights + k, mask=k < K, other=0.0)
            values = tl.load(inputs + k, mask=k < K, other=0.0)
        if SWAP:
            sums = tl.dot(w, tl.trans(values), sums, input_precision="ieee")
        else:
            sums = tl.dot(values, tl.trans(w), sums, input_precision="ieee")
    if SWAP:
        sums = tl.trans(sums)
    inside = (m < num_tokens)[:, None] & (n < num_outputs)[None, :]
    if SPLITS == 1:
        _store(out, sums, bias, m, n, inside, num_outputs, has_bias, out_stride)
    else:
        place = partials + m[:, None] * num_outputs + n[None, :]
        stride = BLOCK_M * num_outputs
        tl.store(place + split * stride, sums, mask=inside)
        tl.debug_barrier()  # all threads' sums are written before one of them says so
        if tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
            sums = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
            for part in tl.range(1, SPLITS, loop_unroll_factor=1):
                sums += tl.load(place + part * stride, mask=inside, other=0.0, cache_modifier=".cg")
            _store(out, sums, bias, m, n, inside, num_outputs, has_bias, out_stride)
            tl.store(counters + tl.program_id(0), 0)


@triton.jit
def _store(
    out: tl.tensor,
    sums: tl.tensor,
    bias: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    inside: tl.tensor,
    num_outputs: tl.tensor,
    has_bias: tl.tensor,
    out_stride: tl.tensor,
) -> None:
    """Add the bias and round once."""
    added = tl.load(bias + n, mask=(n < num_outputs) & (has_bias != 0), other=0.0).to(tl.float32)
    place = out + m.to(tl.int64)[:, None] * out_stride + n[None, :]
    tl.store(place, (sums + added[None, :]).to(out.dtype.element_ty), mask=inside)
