"""What a comparison gives: numbers, times and shares of each contender, as a table, as JSON and as a verdict."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from octavo.testing.ceilings import Ceilings

from octavo_workbench.estimates import Estimate, median_estimate, speedup_estimate
from octavo_workbench.report import table


@dataclass(frozen=True, slots=True)
class Errors:
    """The largest and the mean error against the float64 oracle, in units of what rounding explains."""

    largest: float
    mean: float


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that must be moved, and operations that must be done."""

    num_bytes: int
    num_flops: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender on one case. `speedup` is over the first contender, None for the first itself."""

    case: str
    name: str
    errors: Errors
    seconds: Estimate
    speedup: Estimate | None
    work: Work
    samples: tuple[float, ...]

    def as_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        """The entry, its rates and their shares of the ceilings."""
        return {**asdict(self), "rates": self.rates(ceilings)}

    def rates(self, ceilings: Ceilings) -> dict[str, float]:
        """GB/s and TFLOP/s, and what share of the ceilings they are (0 to 1)."""
        bytes_per_s, flops_per_s = (
            amount / self.seconds.value for amount in (self.work.num_bytes, self.work.num_flops)
        )
        return {
            "gb_per_s": bytes_per_s / 1e9,
            "of_copy": bytes_per_s / ceilings.bytes_per_s,
            "tflop_per_s": flops_per_s / 1e12,
            "of_matmul": flops_per_s / ceilings.flops_per_s,
        }


def entries(
    case: str, names: Sequence[str], errors: Sequence[Errors], samples: Sequence[Sequence[float]], work: Work
) -> list[Entry]:
    """The contenders' entries; `samples` are seconds, one list a contender."""
    return [
        Entry(
            case,
            name,
            error,
            median_estimate(mine),
            speedup_estimate(mine, samples[0]) if i else None,
            work,
            tuple(mine),
        )
        for i, (name, error, mine) in enumerate(zip(names, errors, samples, strict=True))
    ]


def as_json(found: Sequence[Entry], ceilings: Ceilings) -> dict[str, Any]:
    """The entries and the ceilings that their shares are of."""
    return {"ceilings": asdict(ceilings), "entries": [entry.as_dict(ceilings) for entry in found]}


def outcome_table(found: Sequence[Entry], ceilings: Ceilings) -> str:
    """A row for each entry: errors in units of the tolerance, medians with 95% intervals."""
    header = ["case", "backend", "max error", "mean error", "us", "95%", "speedup", "95%", "GB/s", "% copy"]
    return table([*header, "TFLOP/s", "% matmul"], [_row(entry, ceilings) for entry in found])


def _row(entry: Entry, ceilings: Ceilings) -> list[object]:
    rates, times = entry.rates(ceilings), entry.seconds.scaled(1e6)
    faster: list[object] = ["", ""] if entry.speedup is None else [entry.speedup.value, _interval(entry.speedup)]
    return [
        entry.case,
        entry.name,
        entry.errors.largest,
        entry.errors.mean,
        times.value,
        _interval(times),
        *faster,
        rates["gb_per_s"],
        100 * rates["of_copy"],
        rates["tflop_per_s"],
        100 * rates["of_matmul"],
    ]


def _interval(estimate: Estimate) -> str:
    digits = 1 if estimate.high >= 100 else 3
    return f"{estimate.low:.{digits}f}-{estimate.high:.{digits}f}"


def verdicts(found: Sequence[Entry], first: str) -> list[str]:
    """A sentence for each contender but the first, on each case."""
    return [_verdict(entry, entry.speedup, first) for entry in found if entry.speedup is not None]


def _verdict(entry: Entry, speedup: Estimate, first: str) -> str:
    within = f"{speedup.value:.2f} times {first}'s speed, 95% within {speedup.low:.2f} and {speedup.high:.2f}"
    if speedup.low <= 1 <= speedup.high:
        return f"{entry.case}: no difference between {entry.name} and {first} shows ({within})."
    word = "faster" if speedup.low > 1 else "slower"
    return f"{entry.case}: {entry.name} is {word} ({within})."


def misses(found: Sequence[Entry], args: Namespace) -> list[str]:
    """What `--max-error` and `--min-speedup` asked for and did not get."""
    missed = []
    for entry in found:
        if args.max_error is not None and not entry.errors.largest <= args.max_error:
            missed.append(f"{entry.case}: {entry.name} errs by {entry.errors.largest:.2f}, not {args.max_error:g}")
        if args.min_speedup is not None and entry.speedup and entry.speedup.value < args.min_speedup:
            missed.append(f"{entry.case}: {entry.name} is {entry.speedup.value:.2f} times, not {args.min_speedup:g}")
    return missed
