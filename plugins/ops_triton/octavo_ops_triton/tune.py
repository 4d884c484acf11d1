"""`python -m octavo_ops_triton.tune`: time each op on this GPU with several sizes of programs, beside a plain copy.

Each op runs in a CUDA graph over inputs that rotate through more memory than the L2 holds; widths are Llama-8B's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from octavo.kv_cache.interface import KVSpec
from octavo.kv_cache.plain import PlainFormat
from octavo.ops.torch_reference import TorchOps
from octavo.testing.ceilings import measure_ceilings, seconds_of

from octavo_ops_triton.ops import TUNING, TritonOps, Tuning

TOKENS = (1, 32, 256, 4096)
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4096, 14336, 32, 8, 128, 16
ROTATED_BYTES = 256 << 20
MIN_CALLS, MAX_CALLS, ROUNDS = 8, 64, 5
DTYPE = torch.bfloat16
EPS = 1e-5

Call = Callable[[Any], object]
Case = tuple[int, Callable[[], Call]]  # bytes moved, and what makes a call with inputs of its own


def cases(num_tokens: int) -> dict[str, Case]:
    """The ops by name: their bytes for `num_tokens`, and a maker of calls, each of which takes the provider."""
    item, width = DTYPE.itemsize, HEADS + 2 * KV_HEADS
    turned, written = num_tokens * (HEADS + KV_HEADS) * HEAD_DIM, num_tokens * KV_HEADS * HEAD_DIM
    weight, table = _random(HIDDEN), torch.rand(8192, HEAD_DIM, device="cuda")
    positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")

    def norm() -> Call:
        x = _random(num_tokens, HIDDEN).float()
        return lambda ops: ops.rms_norm(x, weight, EPS)

    def add_norm() -> Call:
        x, residual = _random(num_tokens, HIDDEN), torch.randn(num_tokens, HIDDEN, device="cuda")
        return lambda ops: ops.add_rms_norm(x, residual, weight, EPS)

    def silu() -> Call:
        x = _random(num_tokens, 2 * INNER)
        return lambda ops: ops.silu_and_mul(x)

    def rotary() -> Call:
        x = _random(num_tokens, width, HEAD_DIM)[:, : HEADS + KV_HEADS]
        return lambda ops: ops.rotary(x, positions, table)

    def rotary_and_write() -> Call:
        x = _random(num_tokens, width, HEAD_DIM)
        cut = HEADS + KV_HEADS
        plain = PlainFormat(KVSpec(KV_HEADS, HEAD_DIM, BLOCK_SIZE, DTYPE))
        num_blocks = num_tokens // BLOCK_SIZE + 2
        kv = plain.view(torch.zeros(num_blocks, plain.page_bytes(), dtype=torch.uint8, device="cuda"))
        slots = torch.arange(BLOCK_SIZE, BLOCK_SIZE + num_tokens, device="cuda")
        return lambda ops: ops.rotary_and_write(x[:, :cut], x[:, cut:], positions, table, HEADS, plain, kv, slots)

    return {
        "rms_norm": (num_tokens * HIDDEN * (4 + item), norm),
        "add_rms_norm": (num_tokens * HIDDEN * (4 + 4 + 2 * item), add_norm),
        "silu_and_mul": (num_tokens * INNER * 3 * item, silu),
        "rotary": (2 * turned * item, rotary),
        "rotary_and_write": ((2 * turned + 3 * written) * item, rotary_and_write),
    }


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device="cuda")


def tunings(op: str) -> list[Tuning]:
    """The sizes to try for an op, the present ones first."""
    if op in ("rms_norm", "add_rms_norm"):
        return [TUNING, *(replace(TUNING, norm_elements=count) for count in (8, 32))]
    if op == "silu_and_mul":
        return [TUNING, *(replace(TUNING, silu_block=b, silu_warps=w) for b, w in ((1024, 4), (1024, 2), (4096, 8)))]
    return [TUNING, *(replace(TUNING, rotary_heads=h, rotary_warps=w) for h, w in ((4, 1), (8, 4), (16, 4), (16, 8)))]


def record(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls as a CUDA graph, after one warm-up."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def best_us(graphs: Sequence[torch.cuda.CUDAGraph], num_calls: int) -> list[float]:
    """Each graph's best time for a call, in microseconds; they take turns."""
    best = [float("inf")] * len(graphs)
    for _ in range(ROUNDS):
        for i, graph in enumerate(graphs):
            best[i] = min(best[i], 1e6 * seconds_of("cuda", graph.replay) / num_calls)
    return best


def num_calls(num_bytes: int) -> int:
    """As many as rotate through ROTATED_BYTES, within limits: few tokens' inputs lie in the L2 in a model, too."""
    return min(MAX_CALLS, max(MIN_CALLS, -(-ROTATED_BYTES // num_bytes)))


def time_op(op: str, case: Case, num_tokens: int, copy: float) -> dict[str, Any]:
    """Time an op with each tuning and torch's reference; print the best's line."""
    num_bytes, make = case
    calls = [make() for _ in range(num_calls(num_bytes))]
    entries: list[tuple[str, torch.cuda.CUDAGraph]] = []
    providers = [("torch", TorchOps()), *((str(_changed(op, one)), TritonOps(tuning=one)) for one in tunings(op))]
    for name, ops in providers:
        try:
            entries.append((name, record([lambda call=call, ops=ops: call(ops) for call in calls])))  # type: ignore[misc]
        except Exception as error:
            print(f"    {op}, {num_tokens} tokens, {name}: {type(error).__name__}: {str(error)[:200]}")
            torch.cuda.synchronize()
    times = dict(zip((name for name, _ in entries), best_us([graph for _, graph in entries], len(calls)), strict=True))
    best, us = min(((n, t) for n, t in times.items() if n != "torch"), key=lambda pair: pair[1], default=("", 0.0))
    speed = num_bytes / us / 1000 if us else 0.0
    print(
        f"{op:17} {num_tokens:5}  {us:8.2f} us {speed:6.0f} GB/s {speed / copy:5.0%} of a copy   "
        f"torch {times.get('torch', 0.0):8.2f} us   {best}",
        flush=True,
    )
    return {"op": op, "tokens": num_tokens, "bytes": num_bytes, "us": times, "best": best, "share": speed / copy}


def _changed(op: str, tuning: Tuning) -> dict[str, int]:
    part = "norm" if "norm" in op else op.split("_")[0]
    return {name: value for name, value in asdict(tuning).items() if name.startswith(part)}


def main() -> int:
    """Parse the arguments, and time all ops."""
    parser = argparse.ArgumentParser(prog="python -m octavo_ops_triton.tune", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write all timings to this file")
    args = parser.parse_args()
    begin = time.perf_counter()
    copy = measure_ceilings("cuda", DTYPE).bytes_per_s / 1e9
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}; a copy moves {copy:.0f} GB/s")
    rows = [time_op(op, case, tokens, copy) for tokens in TOKENS for op, case in cases(tokens).items()]
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "copy": copy, "ops": rows}, indent=1))
    print(f"done after {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
