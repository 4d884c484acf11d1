"""A launch's place in the chain of kernels that overlap (programmatic dependent launch).

The law of the chain: every program calls `join_chain`, then reads only what kernels before the last plan have written,
then calls `await_chain`, even one without work, before it reads or writes anything else. So a kernel that has ended
tells that all before it have. The keys and values of tokens before a decode's own were written before the plan (C2).
"""
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def join_chain(fresh: tl.tensor, PDL: tl.constexpr) -> None:
    """Let the next kernel start. From here on units, tiles, block tables and old keys may be read.

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
