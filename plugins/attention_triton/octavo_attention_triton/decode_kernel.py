"""The decode kernel: one query token a request, its keys cut into units that are merged by whichever ends last."""
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl

from octavo_attention_triton.chain import await_chain, join_chain
from octavo_attention_triton.softmax import attend_keys, elements_of, finish_rows, start_rows

_MERGED_AT_ONCE = tl.constexpr(8)


@triton.jit
def _store_rows(
    out: tl.tensor,
    lse: tl.tensor,
    values: tl.tensor,
    logs: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    v_factor: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write a KV head's group of one token to out and lse; the token's place is counted in 64 bits."""
    group, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    rows = token.to(tl.int64) * (GROUP * tl.num_programs(0)) + head * GROUP + group
    mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + rows[:, None] * HEAD_DIM + dims[None, :], (values * v_factor).to(out.dtype.element_ty), mask)
    if lse is not None:
        tl.store(lse + rows, logs, group < GROUP)


@triton.jit
def _store_partial(
    record: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """A unit's record: sums [G, D], then maxima [G], then denominators [G]."""
    group, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(record + group[:, None] * HEAD_DIM + dims[None, :], acc, mask)
    tl.store(record + GROUP * HEAD_DIM + group, top, group < GROUP)
    tl.store(record + GROUP * HEAD_DIM + GROUP + group, total, group < GROUP)


@triton.jit
def _merge(
    records: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MERGE_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state of all `count` records, in their order, whoever asks: the same bits every time (contract C12)."""
    group, dims = tl.arange(0, MERGE_G), tl.arange(0, BLOCK_D)
    rows = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    acc, top, total = start_rows(MERGE_G, BLOCK_D)
    for begin in range(0, count, _MERGED_AT_ONCE):
        units = begin + tl.arange(0, _MERGED_AT_ONCE)
        places = records + units.to(tl.int64) * stride
        sums_at = places[:, None, None] + (group[:, None] * HEAD_DIM + dims[None, :])[None, :, :]
        ends_at = places[:, None] + (GROUP * HEAD_DIM + group)[None, :]
        some = (units < count)[:, None] & (group < GROUP)[None, :]
        # Other programs wrote these: read them from the L2 cache, which all multiprocessors share.
        sums = tl.load(sums_at, (units < count)[:, None, None] & rows[None, :, :], other=0.0, cache_modifier=".cg")
        tops = tl.load(ends_at, some, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(ends_at + GROUP, some, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        shares = tl.exp2(tops - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink[:, None] + tl.sum(sums * shares[:, :, None], 0)
        total = total * shrink + tl.sum(totals * shares, 0)
        top = new_top
    return acc, top, total


@triton.jit(
    do_not_specialize=["q_stride", "table_stride", "fresh"],
    do_not_specialize_on_alignment=["lse", "k_scale", "v_scale", "table"],
)
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    units: tl.tensor,
    table: tl.tensor,
    partials: tl.tensor,
    counters: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    fresh: tl.tensor,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MERGE_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    RECORD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (h, u): unit u's keys for the query heads of KV head h, all in one tile of BLOCK_G rows.

    With AHEAD the unit's first tiles, at most STAGES, are loaded while the kernel before still runs.
    """
    join_chain(fresh, PDL)
    head, unit = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(0)
    entry = units + unit * 8
    count, request = tl.load(entry + 5), tl.load(entry)
    token, begin, end = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    index, seq_len = tl.load(entry + 4), tl.load(entry + 6)
    if count == 0:
        await_chain(PDL)
        return
    k_head = k + head.to(tl.int64) * K_STRIDES[1]
    v_head = v + head.to(tl.int64) * V_STRIDES[1]
    table_row = table + request.to(tl.int64) * table_stride
    # The kernel before may be the one that writes the newest token's keys: they must not be among those loaded ahead,
    # which are STAGES - 1 tiles where the loop is pipelined, and one where it is not.
    if not AHEAD or begin + STAGES * BLOCK_N >= seq_len:
        await_chain(PDL)
    group, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    q_row = q + token.to(tl.int64) * elements_of(q_stride, q) + head * (GROUP * HEAD_DIM)
    q_at = q_row + group[:, None] * HEAD_DIM + dims[None, :]
    q_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.zeros((BLOCK_G, BLOCK_D), q.dtype.element_ty) if AHEAD else tl.load(q_at, mask=q_mask, other=0)
    factor = SCALE if k_scale is None else SCALE * tl.load(k_scale + head)
    v_factor = 1.0 if v_scale is None else tl.load(v_scale + head)
    acc, top, total = start_rows(BLOCK_G, BLOCK_D)
    positions = group * 0 + (seq_len - 1)
    acc, top, total = attend_keys(
        queries,
        acc,
        top,
        total,
        k_head,
        v_head,
        table_row,
        begin,
        end,
        seq_len - 1,
        seq_len,
        positions,
        factor,
        K_STRIDES,
        V_STRIDES,
        BLOCK_SIZE,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        WINDOW,
        SOFTCAP,
        True,
        q_at if AHEAD else None,
        q_mask,
        PDL,
    )
    if count == 1:
        values, logs = finish_rows(acc, top, total)
        _store_rows(out, lse, values, logs, token, head, v_factor, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D)
        return
    stride = num_heads * RECORD
    record = partials + unit.to(tl.int64) * stride + head * RECORD
    _store_partial(record, acc, top, total, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D)
    # All threads' stores come before the one thread's release, and its acquire before all threads' loads.
    tl.debug_barrier()
    counter = counters + request * num_heads + head
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == count - 1:
        tl.debug_barrier()
        tl.store(counter, 0)
        first = record - index.to(tl.int64) * stride
        sums, tops, totals = _merge(first, count, stride, GROUP, HEAD_DIM, MERGE_G, BLOCK_D)
        merged, merged_logs = finish_rows(sums, tops, totals)
        _store_rows(out, lse, merged, merged_logs, token, head, v_factor, GROUP, HEAD_DIM, MERGE_G, BLOCK_D)
