"""`octavo bench serve`: latency and throughput of an OpenAI-compatible server, requests at random or all at once."""

import asyncio
import random
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from octavo.errors import ConfigError
from octavo.garbage import spare_garbage_collection

from octavo_workbench.bench.arguments import positive, ratio
from octavo_workbench.bench.serve_client import Served, Server, Target, drive, find_model
from octavo_workbench.estimates import percentile
from octavo_workbench.http_client import Address
from octavo_workbench.report import table, verdict, write_json
from octavo_workbench.workloads import WORKLOADS, fixed, workload

_PERCENTS = (50, 90, 99)
_WARMUP_REQUESTS = 8
_WARMUP_SEED = 99


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's flags; the engine's are the server's matter."""
    names = ", ".join(WORKLOADS)
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", metavar="URL", help="the server (default: %(default)s)"
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name (default: the first of /v1/models)")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token (default: none)")
    parser.add_argument("--workload", default="sharegpt512", metavar="NAME", help=f"{names}, or REQUESTSxINxOUT")
    parser.add_argument("--num-requests", type=positive, metavar="N", help="only the workload's first N requests")
    text = "mean requests per second, at random as a Poisson process (default: all at once)"
    parser.add_argument("--request-rate", type=ratio, metavar="X", help=text)
    parser.add_argument("--max-concurrency", type=positive, metavar="N", help="requests at a time (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrivals (default: 0)")
    text = "requests before, which do not count (default: 8)"
    parser.add_argument("--warmup-requests", type=int, default=_WARMUP_REQUESTS, metavar="N", help=text)
    text = "count requests that keep these limits in ms, of ttft, tpot and e2el, such as ttft:200 tpot:30"
    parser.add_argument("--goodput", type=limit, nargs="+", default=[], metavar="NAME:MS", help=text)
    text = "do not send a cache_salt, which keeps the prompts of earlier runs from being found in the prefix cache"
    parser.add_argument("--no-cache-salt", action="store_true", help=text)
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")


def limit(text: str) -> tuple[str, float]:
    """A limit such as ttft:200, in milliseconds."""
    name, _, value = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise ArgumentTypeError(f"{text!r} is no limit: write ttft:MS, tpot:MS or e2el:MS")
    return name, ratio(value)


@dataclass(frozen=True, slots=True)
class Summary:
    """Percentiles by measure (seconds), and rates; `goodput` is requests per second that kept every limit."""

    seconds: float
    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    tokens_per_s: float
    goodput: float | None
    latencies: dict[str, dict[str, float]]


def summarise(served: Sequence[Served], seconds: float, limits: Sequence[tuple[str, float]]) -> Summary:
    """What the requests that succeeded took."""
    good = [one for one in served if one.error is None]
    prompt, output = sum(one.num_prompt_tokens for one in good), sum(one.num_output_tokens for one in good)
    within = [one for one in good if all(1e3 * one.measure(name) <= ms for name, ms in limits)]
    latencies = {
        "ttft": [one.measure("ttft") for one in good],
        "tpot": [one.measure("tpot") for one in good if one.num_output_tokens > 1],
        "itl": [gap for one in good for gap in one.gaps],
        "e2el": [one.measure("e2el") for one in good],
    }
    return Summary(
        seconds=seconds,
        num_requests=len(served),
        num_failed=len(served) - len(good),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
        num_cached_tokens=sum(one.num_cached_tokens for one in good),
        requests_per_s=len(good) / seconds,
        output_tokens_per_s=output / seconds,
        tokens_per_s=(prompt + output) / seconds,
        goodput=len(within) / seconds if limits else None,
        latencies={name: _spread(values) for name, values in latencies.items() if values},
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": fmean(values), **{f"p{percent}": percentile(values, percent) for percent in _PERCENTS}}


def arrivals(count: int, rate: float | None, seed: int) -> Iterator[float]:
    """Seconds from the start at which each request leaves: all 0, or a Poisson process of `rate` a second."""
    rng, now = random.Random(seed), 0.0
    for _ in range(count):
        yield now
        now += rng.expovariate(rate) if rate else 0.0


def run(args: Namespace) -> int:
    """Print the table; 1 if a request failed or a prompt token came from the prefix cache."""
    jobs = workload(args.workload)[: args.num_requests]
    address = Address.of(args.base_url)
    starts = list(arrivals(len(jobs), args.request_rate, args.seed))
    try:
        model = args.model or asyncio.run(find_model(Server(address, "", args.api_key)))
    except OSError as error:
        raise ConfigError(f"There is no server at {args.base_url}: {error}.") from error
    server = Server(address, model, args.api_key, salted=not args.no_cache_salt)
    if args.warmup_requests:
        warmup = fixed(args.warmup_requests, 32, 16, seed=_WARMUP_SEED)
        asyncio.run(drive(server, [Target(job, 0.0) for job in warmup], None, ""))
    targets = [Target(job, start) for job, start in zip(jobs, starts, strict=True)]
    progress = "" if args.no_progress else args.workload
    spare_garbage_collection()  # a pause of this process would look like one of the server
    served, seconds = asyncio.run(drive(server, targets, args.max_concurrency, progress))
    summary = summarise(served, seconds, args.goodput)
    print(_table(summary))
    settings = {"model": model, "workload": args.workload, "request_rate": args.request_rate}
    settings |= {"max_concurrency": args.max_concurrency, "goodput_limits_ms": dict(args.goodput)}
    write_json(args.json, {"benchmark": "serve", **settings, **asdict(summary)})
    return verdict(_failures(served, summary))


def _failures(served: Sequence[Served], summary: Summary) -> list[str]:
    failures = [one.error for one in served if one.error is not None]
    missed = [f"{len(failures)} of {len(served)} requests failed, the first with: {failures[0]}"] if failures else []
    if summary.num_cached_tokens:
        missed.append(
            f"{summary.num_cached_tokens} prompt tokens came from the prefix cache, so the times are of less work"
        )
    return missed


def _table(summary: Summary) -> str:
    """Latencies in ms, and under them the rates."""
    names = {
        "ttft": "time to first token",
        "tpot": "time per output token",
        "itl": "gap between events",
        "e2el": "whole",
    }
    header = ["ms", "mean", *(f"p{percent}" for percent in _PERCENTS)]
    rows = [[names[name], *(1e3 * value for value in spread.values())] for name, spread in summary.latencies.items()]
    lines = [table(header, rows)] if rows else []
    good = "" if summary.goodput is None else f", goodput {summary.goodput:.2f} requests/s"
    lines.append(
        f"{summary.num_requests} requests ({summary.num_failed} failed) in {summary.seconds:.2f} s: "
        f"{summary.output_tokens_per_s:,.1f} output tok/s, {summary.tokens_per_s:,.1f} tok/s with the prompts', "
        f"{summary.requests_per_s:.2f} requests/s{good}"
    )
    return "\n".join(lines)
