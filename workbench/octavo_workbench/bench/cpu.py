"""`octavo bench cpu`: our offline engine against transformers' `generate` on the same checkpoint, in turns."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from octavo.config import EngineConfig
from octavo.config_args import add_engine_arguments, engine_config
from octavo.errors import ConfigError
from tqdm import tqdm

from octavo_workbench.bench.arguments import positive, positives, ratios
from octavo_workbench.bench.turns import OtherLoad, SideProcess, Turn
from octavo_workbench.report import table, verdict, write_json
from octavo_workbench.workloads import fixed

_NUM_FRESH = 3
_GB = 1e9


@dataclass(slots=True)
class Comparison:
    """Turns of both sides with the same requests, in pairs of neighbours."""

    num_requests: int
    ours: list[Turn] = field(default_factory=list)
    theirs: list[Turn] = field(default_factory=list)

    @property
    def rates(self) -> tuple[float, float]:
        """Median output tokens per second of ours and of theirs."""
        ours, theirs = (median(turn.output_tokens_per_s for turn in side) for side in (self.ours, self.theirs))
        return ours, theirs

    @property
    def speedup(self) -> float:
        """The median of the pairs' ratios: what slows both turns of a pair cancels out."""
        return median(b.seconds / a.seconds for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def same_first_token(self) -> float:
        """The share of requests, 0 to 1, whose first token is the same on both sides: they run the same model.

        Later tokens differ more and more, since in bfloat16 the sides round differently.
        """
        ours, theirs = ([one[0] for turn in turns for one in turn.token_ids] for turns in (self.ours, self.theirs))
        same = [a == b for a, b in zip(ours, theirs, strict=True)]
        return sum(same) / len(same)

    def as_dict(self) -> dict[str, Any]:
        """Rates, speedup and the seconds of every turn."""
        sides = {"ours": self.ours, "theirs": self.theirs}
        seconds = {f"{name}_seconds": [turn.seconds for turn in turns] for name, turns in sides.items()}
        rates = dict(zip(("ours_tokens_per_s", "theirs_tokens_per_s"), self.rates, strict=True))
        return {
            "num_requests": self.num_requests,
            **rates,
            "speedup": self.speedup,
            **seconds,
            "same_first_token": self.same_first_token,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """Fresh processes of ours: seconds until ready (median) and the memory peak of a run, in bytes."""

    ready_seconds: float
    peak_bytes: int


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's flags and the engine's."""
    text = "how many requests run at once (default: 1,8,32)"
    parser.add_argument("--requests", type=positives, default=[1, 8, 32], metavar="N,N", help=text)
    text = "length of each prompt (default: 128)"
    parser.add_argument("--prompt-tokens", type=positive, default=128, metavar="N", help=text)
    text = "tokens that each request generates (default: 128)"
    parser.add_argument("--output-tokens", type=positive, default=128, metavar="N", help=text)
    text = "turns of each side, the medians count (default: 5)"
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help=text)
    text = "exit with 1 if ours is not this many times faster: a number for each of --requests, such as 2.1,1.9,2.1"
    parser.add_argument("--min-speedup", type=ratios, metavar="X,X", help=text)
    add_engine_arguments(parser)


def run(args: Namespace) -> int:
    """Print the comparison; 1 if `--min-speedup` is missed."""
    minima = args.min_speedup or []
    if minima and len(minima) != len(args.requests):
        raise ConfigError(f"--min-speedup has {len(minima)} numbers for {len(args.requests)} of --requests.")
    config = same_terms(engine_config(args))
    jobs = [[job.prompt_token_ids for job in fixed(count, args.prompt_tokens, 1)] for count in args.requests]
    load = OtherLoad()
    with SideProcess("octavo", config) as ours, SideProcess("transformers", config) as theirs:
        threads = {ours.num_threads, theirs.num_threads}
        if len(threads) > 1:
            raise ConfigError(f"The sides have {sorted(threads)} threads: set --num-threads.")
        comparisons = compare(ours, theirs, jobs, args.output_tokens, args.runs, config.progress)
    fresh = measure_fresh(config, max(jobs, key=len), args.output_tokens)
    others = load.share()
    print(_report(comparisons, fresh, threads.pop(), others))
    results = [one.as_dict() for one in comparisons]
    write_json(args.json, {"benchmark": "cpu", "comparisons": results, "fresh": asdict(fresh), "other_load": others})
    return verdict(_failures(comparisons, minima))


def same_terms(config: EngineConfig) -> EngineConfig:
    """The configuration for both sides: bfloat16 unless asked otherwise, and no prefix cache."""
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    return replace(config, dtype=dtype, enable_prefix_caching=False)


def compare(
    ours: SideProcess,
    theirs: SideProcess,
    jobs: Sequence[list[list[int]]],
    num_output_tokens: int,
    num_runs: int,
    progress: bool = False,
) -> list[Comparison]:
    """A comparison for each list of prompts: a warm-up of both sides, then turns of ours and theirs by and by."""
    comparisons = [Comparison(len(prompts)) for prompts in jobs]
    with tqdm(total=2 * (num_runs + 1) * len(jobs), unit="turn", leave=False, disable=not progress) as bar:
        for number in range(num_runs + 1):
            for comparison, prompts in zip(comparisons, jobs, strict=True):
                for side, turns in ((ours, comparison.ours), (theirs, comparison.theirs)):
                    bar.set_description(f"{side.name}, {len(prompts)} at once{'' if number else ' (warm-up)'}")
                    turn = side.take_turn(prompts, num_output_tokens)
                    bar.update()
                    if number:
                        turns.append(turn)
    return comparisons


def measure_fresh(config: EngineConfig, prompts: list[list[int]], num_output_tokens: int) -> Fresh:
    """Start ours afresh a few times, and run the prompts in the last process."""
    quiet = replace(config, progress=False)
    ready_seconds = []
    for number in range(1, _NUM_FRESH + 1):
        with SideProcess("octavo", quiet) as side:
            ready_seconds.append(side.ready_seconds)
            if number == _NUM_FRESH:
                peak = side.take_turn(prompts, num_output_tokens).peak_bytes
    return Fresh(ready_seconds=median(ready_seconds), peak_bytes=peak)


def _report(comparisons: Sequence[Comparison], fresh: Fresh, num_threads: int, others: float | None) -> str:
    header = ["at once", "octavo tok/s", "transformers tok/s", "speedup", "pairs", "same first token %"]
    rows = [
        [one.num_requests, *one.rates, one.speedup, len(one.ours), 100 * one.same_first_token] for one in comparisons
    ]
    idle = sum(turn.idle_cpu_seconds for turn in _turns(comparisons))
    known = "" if others is None else f"; other work took {100 * others:.0f}% of the CPUs"
    lines = [
        table(header, rows),
        f"ready after {fresh.ready_seconds:.1f} s in a fresh process; its peak memory {fresh.peak_bytes / _GB:.2f} GB",
        f"{num_threads} threads each; {idle:.1f} s of CPU time in processes that should have waited{known}",
    ]
    return "\n".join(lines)


def _turns(comparisons: Sequence[Comparison]) -> list[Turn]:
    return [turn for one in comparisons for turn in (*one.ours, *one.theirs)]


def _failures(comparisons: Sequence[Comparison], minima: Sequence[float]) -> list[str]:
    pairs = zip(comparisons, minima, strict=False)
    return [
        f"{one.num_requests} at once: {one.speedup:.2f} times as fast, not {least:g}"
        for one, least in pairs
        if one.speedup < least
    ]
