"""`octavo bench startup`: from the start of a process to an engine that can generate, by phase."""

import json
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from octavo.config import EngineConfig
from octavo.config_args import add_engine_arguments
from octavo.errors import EngineDeadError, OctavoError
from tqdm import tqdm

from octavo_workbench.bench.arguments import positive, ratio
from octavo_workbench.bench.offline import add_shape_argument, shaped_config
from octavo_workbench.report import table, verdict, write_json

READY = "ready"
FIRST_TOKEN = "first token after it"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's flags and the engine's."""
    parser.add_argument("--runs", type=positive, default=3, metavar="N", help="fresh processes (default: 3)")
    text = "exit with 1 if the median process takes more seconds until it is ready"
    parser.add_argument("--max-seconds", type=ratio, metavar="X", help=text)
    add_shape_argument(parser)
    add_engine_arguments(parser)


def run(args: Namespace) -> int:
    """Print the median seconds of each phase; 1 if `--max-seconds` is missed."""
    with shaped_config(args) as config:
        starts = measure(config, args.runs)
    phases = {name: median(start[name] for start in starts) for name in starts[0]}
    print(_table(phases, starts))
    write_json(args.json, {"benchmark": "startup", "median_seconds": phases, "runs": starts})
    if args.max_seconds is None or phases[READY] <= args.max_seconds:
        return 0
    return verdict([f"ready after {phases[READY]:.2f} s, not {args.max_seconds:g} s"])


def measure(config: EngineConfig, num_runs: int) -> list[dict[str, float]]:
    """Seconds of each phase of some fresh processes, one after the other."""
    bar = tqdm(range(num_runs), desc="Starting", unit="process", leave=False, disable=not config.progress)
    return [start(config) for _ in bar]


def start(config: EngineConfig) -> dict[str, float]:
    """Seconds of each phase of one fresh process. Raises EngineDeadError when it ends, OctavoError when it refuses."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "octavo_workbench.bench.startup_worker"],
        input=json.dumps({"begin": begin, "config": asdict(config)}),
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    if done.returncode or not done.stdout:
        raise EngineDeadError(f"The process that starts the engine ended with code {done.returncode}; see above.")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise OctavoError(f"The engine cannot start: {answer['error']}")
    phases: dict[str, float] = answer["phases"]
    return phases


def _table(phases: dict[str, float], starts: Sequence[dict[str, float]]) -> str:
    rows = [
        [name, seconds, min(s[name] for s in starts), max(s[name] for s in starts)] for name, seconds in phases.items()
    ]
    return table(["phase", "median s", "least", "most"], rows)
