"""A launch's place in the chain of kernels that overlap (programmatic dependent launch), and what it does meanwhile.

The law of the chain: every program calls `join_chain`, then reads only what kernels before the last plan have written,
then calls `await_chain`, even one without work, before it reads or writes anything else. So a kernel that has ended
tells that all before it have.
"""
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def join_chain(fresh: tl.tensor, PDL: tl.constexpr) -> None:
    """Let the next kernel start. From here on units, tiles and block tables may be read.

    The first launch after a plan, which is `fresh`, waits for the plan's kernel; the others cannot start before it.
    """
    if PDL:
        if fresh != 0:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_chain(PDL: tl.constexpr) -> None:
    """Wait for the end of the kernel before."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def ask_l2(
    k_head: tl.tensor,
    v_head: tl.tensor,
    table_row: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    K_STRIDES: tl.constexpr,
    V_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCKS: tl.constexpr,
    THREADS: tl.constexpr,
) -> None:
    """Have the L2 cache fetch the first BLOCKS blocks of one head's keys and values from `begin` to `end`.

    A block's part of a head lies in one piece. The newest token may not be written yet: the L2 cache takes its write.
    The threads of a warp issue these copies one after the other, so the blocks are dealt out to all warps.
    """
    share: tl.constexpr = THREADS // BLOCKS
    piece: tl.constexpr = BLOCK_SIZE * HEAD_DIM * k_head.dtype.element_ty.primitive_bitwidth // 8
    thread = tl.arange(0, THREADS)
    block = begin // BLOCK_SIZE + thread // share
    wanted = (thread % share == 0) & (block * BLOCK_SIZE < end)
    ids = tl.load(table_row + block, mask=wanted, other=0).to(tl.int64)
    k_at, v_at = (k_head + ids * K_STRIDES[0]).to(tl.int64), (v_head + ids * V_STRIDES[0]).to(tl.int64)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3;"
        " @p cp.async.bulk.prefetch.L2.global [$2], $3; mov.b32 $0, 0; }",
        "=r,l,l,r,r",
        [k_at, v_at, piece, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
