"""The prefill kernel: tiles of several tokens of one request, with all query heads of a KV head side by side."""
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl

from octavo_attention_triton.chain import await_chain, join_chain
from octavo_attention_triton.softmax import attend_keys, attend_own_keys, elements_of, finish_rows, start_rows


@triton.jit(
    do_not_specialize=["q_stride", "table_stride", "fresh"],
    do_not_specialize_on_alignment=["lse", "k_scale", "v_scale", "table"],
)
def prefill_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    k_scale: tl.tensor,
    v_scale: tl.tensor,
    tiles: tl.tensor,
    table: tl.tensor,
    k_new: tl.tensor_descriptor,
    v_new: tl.tensor_descriptor,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (h, t): tile t's tokens for the query heads of KV head h; row m is head m % GROUP of token m // GROUP.

    `k_new` and `v_new` [T, Hk D], if they are given, serve whole tiles of keys that this step has computed.
    """
    join_chain(fresh, PDL)
    head, entry = tl.program_id(0), tiles + tl.program_id(1) * 8
    num_tokens, request = tl.load(entry + 3), tl.load(entry)
    token, first, cached = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 4)
    await_chain(PDL)
    if num_tokens == 0:
        return
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    offsets = rows // GROUP
    heads = head * GROUP + rows % GROUP
    mine = offsets < num_tokens
    mask = mine[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = (token + offsets).to(tl.int64) * elements_of(q_stride, q) + heads * HEAD_DIM
    queries = tl.load(q + q_rows[:, None] + dims[None, :], mask=mask, other=0)
    factor = SCALE if k_scale is None else SCALE * tl.load(k_scale + head)
    k_head = k + head.to(tl.int64) * K_STRIDES[1]
    v_head = v + head.to(tl.int64) * V_STRIDES[1]
    table_row = table + request.to(tl.int64) * table_stride
    positions = first + offsets
    limit = first + num_tokens
    # Keys before `whole_begin` are behind some row's window, and those from `whole_end` on ahead of some row.
    whole_begin, whole_end = 0, tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N
    acc, top, total = start_rows(BLOCK_M, BLOCK_D)
    if WINDOW:
        begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        whole_begin = tl.cdiv(tl.maximum(limit - WINDOW, 0), BLOCK_N) * BLOCK_N
        acc, top, total = attend_keys(
            queries, acc, top, total, k_head, v_head, table_row, begin, tl.minimum(whole_begin, limit), first, limit,
            positions, factor, K_STRIDES, V_STRIDES, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, True,
        )  # fmt: skip
    paged_end = whole_end
    if k_new is not None:
        paged_end = tl.minimum(tl.cdiv(cached, BLOCK_N) * BLOCK_N, whole_end)
    acc, top, total = attend_keys(
        queries, acc, top, total, k_head, v_head, table_row, whole_begin, paged_end, first, limit,
        positions, factor, K_STRIDES, V_STRIDES, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, False,
    )  # fmt: skip
    if k_new is not None:
        acc, top, total = attend_own_keys(
            queries, acc, top, total, k_new, v_new, head * HEAD_DIM, token - first, paged_end, whole_end,
            positions, factor, BLOCK_N, SOFTCAP,
        )  # fmt: skip
    acc, top, total = attend_keys(
        queries, acc, top, total, k_head, v_head, table_row, tl.maximum(whole_begin, whole_end), limit, first, limit,
        positions, factor, K_STRIDES, V_STRIDES, BLOCK_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, True,
    )  # fmt: skip
    values, logs = finish_rows(acc, top, total)
    if v_scale is not None:
        values *= tl.load(v_scale + head)
    out_rows = (token + offsets).to(tl.int64) * (GROUP * tl.num_programs(0)) + heads
    tl.store(out + out_rows[:, None] * HEAD_DIM + dims[None, :], values.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        tl.store(lse + out_rows, logs, mask=mine)
