"""`python -m octavo_matmul_triton.tune`: time each candidate and cuBLAS on this GPU, and print the rules to pin.

Weights rotate through more memory than the L2 holds; all candidates of a cell are checked against float64 first and
then timed in turns, each in a CUDA graph of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from octavo.testing.ceilings import seconds_of
from octavo.weights.canonical import Dense
from octavo.weights.interface import Activation
from octavo.weights.torch_matmul import TorchMatmul

from octavo_matmul_triton.candidates import SHAPES, TOKENS, candidates
from octavo_matmul_triton.matmul import FewTokens
from octavo_matmul_triton.tuning import Config

ROTATED_BYTES = 256 << 20  # several times an L2
GRAPH_BYTES = 3 << 30  # of weights read in a graph: about a millisecond
ROUNDS = 5
MARGIN = 0.98  # of cuBLAS's time: what a candidate must beat
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Timing:
    """One candidate's time for a product; `config` is None for cuBLAS."""

    config: Config | None
    us: float


@dataclass(frozen=True, slots=True)
class Weights:
    """Copies of one weight, and the exact product of its first copy with `x` [64, K] in float64."""

    copies: list[torch.Tensor]
    x: torch.Tensor
    exact: torch.Tensor
    bounds: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of one copy."""
        return self.copies[0].nbytes


def make_weights(out_features: int, in_features: int) -> Weights:
    """Random weights and inputs; the bound of an error is that of float32 sums (Higham 2002, eq. 3.5), rounded once."""
    count = max(1, -(-ROTATED_BYTES // (out_features * in_features * DTYPE.itemsize)))
    copies = [torch.randn(out_features, in_features, dtype=DTYPE, device="cuda") for _ in range(count)]
    x = torch.randn(max(TOKENS), in_features, dtype=DTYPE, device="cuda")
    wide = x.double()
    exact = torch.cat([wide @ part.double().T for part in torch.split(copies[0], 8192)], dim=1)
    sizes = torch.cat([wide.abs() @ part.double().abs().T for part in torch.split(copies[0], 8192)], dim=1)
    bounds = 1.01 * torch.finfo(DTYPE).eps / 2 * exact.abs() + (in_features + 2) * 2.0**-24 * sizes
    return Weights(copies, x, exact, bounds)


def record(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls as a CUDA graph, after one warm-up."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def product(matmul: Any, weights: Weights, tokens: int) -> list[Callable[[], object]]:
    """Calls that read about GRAPH_BYTES of weights, copy after copy."""
    x = Activation(weights.x[:tokens])
    count = max(2, GRAPH_BYTES // weights.num_bytes)
    packed = [matmul.pack(Dense(copy)) for copy in weights.copies]
    return [lambda i=i: matmul.apply(x, packed[i % len(packed)], None) for i in range(count)]  # type: ignore[misc]


def check(matmul: Any, weights: Weights, tokens: int) -> None:
    """Raise ValueError where the product is further from float64's than float32 sums allow."""
    packed = matmul.pack(Dense(weights.copies[0]))
    got = matmul.apply(Activation(weights.x[:tokens]), packed, None).double()
    excess = (got - weights.exact[:tokens]).abs() - weights.bounds[:tokens]
    if not bool((excess <= 0).all()):
        raise ValueError(f"its error is {excess.max().item():.3g} above the bound")


def time_cell(weights: Weights, tokens: int) -> list[Timing]:
    """The candidates that work and cuBLAS, fastest first; those that fail are printed."""
    graphs: list[tuple[Config | None, torch.cuda.CUDAGraph, int]] = []
    for config in (None, *candidates(tokens)):
        matmul = TorchMatmul() if config is None else FewTokens(rule={tokens: config})
        try:
            if config is not None:
                check(matmul, weights, tokens)
            calls = product(matmul, weights, tokens)
            graphs.append((config, record(calls), len(calls)))
        except Exception as error:
            print(f"    {tokens} tokens, {config}: {type(error).__name__}: {str(error)[:200]}")
            torch.cuda.synchronize()
    best = [float("inf")] * len(graphs)
    for _ in range(ROUNDS):
        for i, (_, graph, count) in enumerate(graphs):
            best[i] = min(best[i], 1e6 * seconds_of("cuda", graph.replay) / count)
    return sorted((Timing(config, us) for (config, _, _), us in zip(graphs, best, strict=True)), key=lambda t: t.us)


def compile_share(index: int, count: int) -> None:
    """Compile every `count`-th candidate from `index` on into Triton's cache; no variant depends on out features."""
    tasks = [(k, n, c) for k in sorted({k for _, k in SHAPES.values()}) for n in TOKENS for c in candidates(n)]
    for width, tokens, config in tasks[index::count]:
        try:
            FewTokens(rule={tokens: config}).pack(Dense(torch.zeros(256, width, dtype=DTYPE, device="cuda")))
        except Exception as error:
            print(f"    {tokens} tokens, {config}: does not compile: {type(error).__name__}: {str(error)[:200]}")


def compile_all() -> None:
    """Compile all candidates in processes, one a core; what one of them fails to do is done later."""
    count = max(1, min(16, os.cpu_count() or 1))
    command = [sys.executable, "-m", "octavo_matmul_triton.tune", "--compile"]
    workers = [subprocess.Popen([*command, f"{i}/{count}"]) for i in range(count)]
    for worker in workers:
        worker.wait()


def report(name: str, weights: Weights, tokens: int, timings: list[Timing]) -> dict[str, Any]:
    """Print a cell's line, and return it as JSON can hold it."""
    cublas = next((t.us for t in timings if t.config is None), float("nan"))
    best = next((t for t in timings if t.config is not None), Timing(None, float("nan")))
    speeds = [weights.num_bytes / us / 1000 for us in (best.us, cublas)]
    print(
        f"{name:14} {tokens:3}  triton {best.us:7.2f} us {speeds[0]:6.0f} GB/s   cuBLAS {cublas:7.2f} us "
        f"{speeds[1]:6.0f} GB/s   x{cublas / best.us:.3f}  {best.config}",
        flush=True,
    )
    rows = [{"config": t.config and {"kind": type(t.config).__name__, **asdict(t.config)}, "us": t.us} for t in timings]
    return {"shape": list(weights.copies[0].shape), "tokens": tokens, "timings": rows}


def winners(cells: list[tuple[int, list[Timing]]]) -> dict[int, Config]:
    """The best candidate of each number of tokens, up to the first that does not beat cuBLAS."""
    rule: dict[int, Config] = {}
    for tokens, timings in cells:
        best = next((t for t in timings if t.config is not None), None)
        cublas = next((t.us for t in timings if t.config is None), float("inf"))
        if best is None or best.config is None or best.us > MARGIN * cublas:
            break
        rule[tokens] = best.config
    return rule


def tune(deadline: float) -> list[dict[str, Any]]:
    """Time all cells until `deadline` (of perf_counter); print the table and the rules as tuning.py holds them."""
    rows, rules = [], []
    for name, (out_features, in_features) in SHAPES.items():
        weights, cells = make_weights(out_features, in_features), []
        for tokens in TOKENS:
            if time.perf_counter() > deadline:
                print(f"{name:14} {tokens:3}  left out: no time is left", flush=True)
                continue
            cells.append((tokens, time_cell(weights, tokens)))
            rows.append(report(name, weights, *cells[-1]))
        rules.append(((out_features, in_features), winners(cells)))
    print("\nFor PINNED in tuning.py:")
    for shape, rule in rules:
        print(f"        {shape}: {{")
        print("".join(f"            {tokens}: {config},\n" for tokens, config in rule.items()), end="        },\n")
    return rows


def main() -> int:
    """Parse the arguments, and tune."""
    parser = argparse.ArgumentParser(prog="python -m octavo_matmul_triton.tune", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write all timings to this file")
    parser.add_argument("--seconds", type=float, default=80, help="begin no cell later than this (default 80)")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_share(*map(int, args.compile.split("/")))
        return 0
    begin = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}; weights read cold", flush=True)
    compile_all()
    print(f"compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    rows = tune(begin + args.seconds)
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "cells": rows}, indent=1))
    print(f"done after {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
