"""python -m octavo_attention_triton.tune: check and time candidate settings on this GPU, beside the pinned ones."""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from octavo.attention.interface import AttentionSpec
from octavo.device import current_device
from octavo.testing.attention import check_attention, make_case, make_spec
from octavo.testing.ceilings import Ceilings, measure_ceilings

from octavo_attention_triton.backend import TritonAttention
from octavo_attention_triton.bench import (
    Workload,
    build,
    capture,
    make_inputs,
    time_interleaved,
)
from octavo_attention_triton.options import TritonAttentionOptions
from octavo_attention_triton.tuning import DecodeTuning, PrefillTuning, Tuning, tuning_for

WORKLOADS = (
    Workload("decode 32x8k", 32, 1, 8192),
    Workload("decode 16x2k", 16, 1, 2048),
    Workload("decode 4x2k", 4, 1, 2048),
    Workload("decode 32x640", 32, 1, 640),
    Workload("decode 48x640", 48, 1, 640),
    Workload("decode 64x640", 64, 1, 640),
    Workload("decode 128x640", 128, 1, 640),
    Workload("decode 256x640", 256, 1, 640),
    Workload("decode 1x256", 1, 1, 256),
    Workload("prefill 1x8k", 1, 8192, 8192),
    Workload("prefill 16x512", 16, 512, 512),
    Workload("chunk 1x1k after 7k", 1, 1024, 8192),
)
# A multiprocessor holds as many programs as its registers and shared memory allow: here 8 of 16/1/3, 5 of 32/4/3 and
# 32/2/3, 3 or 4 of 64/4/2, 3 of 64/4/3, 2 of 64/4/4. `programs` that all run at once read all that they read in one go.
DECODES = (
    DecodeTuning(16, 1, 3, 32, 528, ahead=True),
    DecodeTuning(16, 1, 3, 64, 528),
    DecodeTuning(16, 1, 4, 32, 396, ahead=True),
    DecodeTuning(32, 1, 3, 64, 264, ahead=True),
    DecodeTuning(32, 2, 3, 64, 528, ahead=True),
    DecodeTuning(32, 4, 3, 128, 660),
    DecodeTuning(64, 4, 2, 128, 396, ahead=True),
    DecodeTuning(64, 4, 2, 128, 528),
    DecodeTuning(64, 4, 2, 128, 1056),
    DecodeTuning(64, 4, 3, 128, 264, ahead=True),
    DecodeTuning(64, 4, 3, 128, 396, ahead=True),
    DecodeTuning(64, 4, 4, 128, 264),
    DecodeTuning(64, 4, 4, 128, 264, ahead=True),
    DecodeTuning(128, 4, 2, 128, 264, ahead=True),
    DecodeTuning(128, 8, 2, 128, 264, ahead=True),
)
# 128 registers let two programs of 8 warps share a multiprocessor, 168 three of 4 warps and 32 keys.
PREFILLS = (
    PrefillTuning(128, 64, 8, 3, True),
    PrefillTuning(128, 64, 8, 2, True, 128),
    PrefillTuning(128, 128, 8, 2, True),
    PrefillTuning(64, 64, 4, 2, True),
    PrefillTuning(128, 32, 8, 3, True, 128),
    PrefillTuning(128, 64, 8, 3),
    PrefillTuning(64, 64, 4, 3, True),
    PrefillTuning(64, 32, 4, 3, True, 168),
    PrefillTuning(128, 64, 8, 4, True),
    PrefillTuning(256, 64, 16, 2, True, 128),
    PrefillTuning(64, 64, 4, 2),
    PrefillTuning(128, 128, 8, 2),
)
_CHECKED = ((1, 1), (1, 300), (1, 700), (9, 50), (530, 700), (64, 64))


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings under test: a backend class that carries them."""

    name: str
    cls: type[TritonAttention]


@dataclass(frozen=True, slots=True)
class Result:
    """One candidate on one workload: microseconds a call, bytes and operations per second, part of the limit."""

    workload: str
    candidate: str
    us: float
    gb_per_s: float
    tflop_per_s: float
    share: float


def bench_spec() -> AttentionSpec:
    """Llama-3.1-8B's heads in bfloat16, blocks of 16, on this GPU."""
    spec = make_spec(num_heads=32, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, device=current_device("cuda"))
    return replace(spec, max_requests=256, max_tokens=8192, max_model_len=8192)


def _candidates(
    decodes: Sequence[DecodeTuning], prefills: Sequence[PrefillTuning], pinned: Tuning
) -> Iterator[Candidate]:
    def candidate(name: str, tuned: Tuning) -> Candidate:
        return Candidate(name, type("Tuned", (TritonAttention,), {"tuned": tuned}))

    yield candidate("pinned", pinned)
    for decode, prefill in zip_longest(decodes, prefills):
        if decode:
            yield candidate(_name(decode), replace(pinned, decodes=(decode,)))
        if prefill:
            yield candidate(_name(prefill), replace(pinned, prefill=prefill))


def _name(tuning: DecodeTuning | PrefillTuning) -> str:
    return "/".join(str(int(value)) for value in asdict(tuning).values())


def _checked(
    candidates: Iterator[Candidate],
    spec: AttentionSpec,
    deadline: float,
    requests: Sequence[tuple[int, int]] = _CHECKED,
) -> Iterator[Candidate]:
    """Those that compile and are right, while there is time; each of the others leaves a line."""
    case = make_case(spec, requests, padding_tokens=3).to(spec.device.torch_device)
    for candidate in candidates:
        if time.monotonic() > deadline:
            print(f"{candidate.name}: left out, the time is up", flush=True)
            continue
        try:
            check_attention(candidate.cls, case)
        except Exception as error:
            print(f"{candidate.name}: {_first_line(error)}", flush=True)
        else:
            yield candidate


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def _time(work: Workload, candidates: list[Candidate], spec: AttentionSpec, ceilings: Ceilings) -> list[Result]:
    inputs = make_inputs(work, spec)
    names, graphs, backends = [], [], []
    for candidate in candidates:
        try:
            backend = build(candidate.cls, spec, TritonAttentionOptions())
            graph = capture(backend, inputs)
        except Exception as error:
            print(f"{work.name} {candidate.name}: {_first_line(error)}", flush=True)
            continue
        names.append(candidate.name)
        graphs.append(graph)
        backends.append(backend)
    results = []
    for name, us in zip(names, time_interleaved([graph.replay for graph in graphs]), strict=True):
        seconds = us / inputs.calls / 1e6
        moved, done = work.kv_bytes(spec) / seconds, work.flops(spec) / seconds
        share = moved / ceilings.bytes_per_s if work.is_decode else done / ceilings.flops_per_s
        results.append(Result(work.name, name, seconds * 1e6, moved / 1e9, done / 1e12, share))
    return results


def _print(results: list[Result]) -> None:
    best = min((result.us for result in results), default=0.0)
    for result in results:
        mark = "*" if result.us == best else " "
        print(
            f"{mark} {result.workload:<19} {result.candidate:<22} {result.us:9.1f} us {result.gb_per_s:7.0f} GB/s"
            f" {result.tflop_per_s:6.0f} TFLOP/s {result.share:6.1%}",
            flush=True,
        )


def _host_microseconds(spec: AttentionSpec) -> dict[str, float]:
    """What a plan and a forward of a small decode cost the host, and a forward of a prompt that is read from `new`."""
    inputs = make_inputs(Workload("host", 1, 1, 256), spec)
    prompt = make_inputs(Workload("host", 1, 512, 512), spec)
    backend = build(TritonAttention, spec, TritonAttentionOptions())
    plan, prompt_plan = backend.plan(inputs.batch), backend.plan(prompt.batch)
    calls: dict[str, Callable[[], object]] = {
        "plan": lambda: backend.plan(inputs.batch),
        "forward": lambda: backend.forward(plan, inputs.q, inputs.caches[0], inputs.out, new=inputs.new),
        "prompt": lambda: backend.forward(prompt_plan, prompt.q, prompt.caches[0], prompt.out, new=prompt.new),
    }
    costs = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            call()
        costs[name] = (time.perf_counter() - begin) / 200 * 1e6
        torch.cuda.synchronize()
    return costs


def tune(seconds: float, shapes: str = "") -> dict[str, Any]:
    """Check all candidates within `seconds`, time the right ones on the workloads whose name contains `shapes`.

    Prints a table and returns it.
    """
    deadline = time.monotonic() + seconds
    spec = bench_spec()
    workloads = [work for work in WORKLOADS if shapes in work.name]
    decodes = DECODES if any(work.is_decode for work in workloads) else ()
    prefills = PREFILLS if any(not work.is_decode for work in workloads) else ()
    ceilings = measure_ceilings("cuda", spec.dtype)
    print(f"{spec.device.name}: {ceilings}", flush=True)
    pinned = tuning_for(spec.device.capability, spec.head_dim, spec.dtype.itemsize)
    print(f"pinned: decode {', '.join(map(_name, pinned.decodes))}, prefill {_name(pinned.prefill)}", flush=True)
    candidates = list(_checked(_candidates(decodes, prefills, pinned), spec, deadline))
    results: list[Result] = []
    for work in workloads:
        varied = ["pinned", *(_name(one) for one in (decodes if work.is_decode else prefills))]
        timed = _time(work, [one for one in candidates if one.name in varied], spec, ceilings)
        _print(timed)
        results += timed
        torch.cuda.empty_cache()
    host = _host_microseconds(spec)
    print("host: " + ", ".join(f"{name} {us:.1f} us" for name, us in host.items()), flush=True)
    return {
        "device": spec.device.name,
        "copy_bytes_per_s": ceilings.bytes_per_s,
        "matmul_flops": ceilings.flops_per_s,
        "host_us": host,
        "results": [asdict(result) for result in results],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, tune, and write the results where --json says."""
    parser = argparse.ArgumentParser(prog="python -m octavo_attention_triton.tune", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--seconds", type=float, default=45, help="time for compiling and checking (default: 45)")
    parser.add_argument("--shapes", default="", metavar="TEXT", help="only workloads whose name contains TEXT")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    results = tune(args.seconds, args.shapes)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
