"""`octavo bench offline`: tokens per second of a workload, on the engine in this process."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from octavo.config import EngineConfig
from octavo.config_args import add_engine_arguments, engine_config
from octavo.errors import ConfigError

from octavo_workbench.bench.arguments import positive
from octavo_workbench.report import table, write_json
from octavo_workbench.session import Run, Session
from octavo_workbench.workloads import SHAPES, WORKLOADS, Job, model_of_shape, workload

_WARMUP_REQUESTS = 32
_WARMUP_TOKENS = 16


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's flags and the engine's."""
    names = ", ".join(WORKLOADS)
    parser.add_argument("--workload", default="sharegpt512", metavar="NAME", help=f"{names}, or REQUESTSxINxOUT")
    parser.add_argument("--num-requests", type=positive, metavar="N", help="only the workload's first N requests")
    parser.add_argument("--runs", type=positive, default=2, metavar="N", help="runs, the fastest counts (default: 2)")
    add_shape_argument(parser)
    add_engine_arguments(parser)


def add_shape_argument(parser: ArgumentParser) -> None:
    """Add `--shape`, which stands in for a model."""
    text = "random weights of a model of this shape, instead of MODEL"
    parser.add_argument("--shape", choices=list(SHAPES), help=text)


@contextmanager
def shaped_config(args: Namespace, default_shape: str | None = None) -> Iterator[EngineConfig]:
    """The engine's configuration, with `--shape` (or `default_shape`, where no model is named) as its model.

    Raises ConfigError when both a model and a shape are given.
    """
    config = engine_config(args)
    if args.shape and config.model:
        raise ConfigError(f"Both a model ({config.model}) and --shape {args.shape} are given: leave one out.")
    shape = args.shape or (None if config.model else default_shape)
    if shape is None:
        yield config
        return
    with model_of_shape(SHAPES[shape]) as folder:
        yield replace(config, model=folder, load_format="dummy")


def run(args: Namespace) -> int:
    """Print the rates; 1 if the prefix cache served anything, since the rates then mean something else."""
    jobs = workload(args.workload)[: args.num_requests]
    with shaped_config(args) as config, Session(config) as session:
        runs = measure(session, jobs, args.runs, config.progress)
        details = asdict(session.info) | ({"model": args.shape} if args.shape else {})
    best = max(runs, key=lambda run: run.output_tokens_per_s)
    print(_table(args.workload, runs))
    print(f"best: {best.output_tokens_per_s:,.1f} output tok/s, {best.tokens_per_s:,.1f} tok/s with the prompts'")
    rates = {"output_tokens_per_s": best.output_tokens_per_s, "tokens_per_s": best.tokens_per_s}
    result = {"benchmark": "offline", "workload": args.workload, **rates, "runs": [asdict(one) for one in runs]}
    write_json(args.json, result | {"engine": details})
    if any(one.num_cached_tokens for one in runs):
        print("failed: prompt tokens came from the prefix cache, so these are no rates of this workload")
        return 1
    return 0


def measure(session: Session, jobs: list[Job], num_runs: int, progress: bool = False) -> list[Run]:
    """Runs of a workload after a short warm-up, each with an empty prefix cache."""
    session.run([Job(job[0], min(job[1], _WARMUP_TOKENS)) for job in jobs[:_WARMUP_REQUESTS]])
    runs = []
    for number in range(1, num_runs + 1):
        session.engine.reset_prefix_cache()
        runs.append(session.run(jobs, progress=f"Run {number} of {num_runs}" if progress else ""))
    return runs


def _table(name: str, runs: list[Run]) -> str:
    header = ["workload", "requests", "tokens in", "out", "cached", "seconds", "output tok/s", "tok/s", "steps"]
    rows = [
        [
            name,
            one.num_requests,
            one.num_prompt_tokens,
            one.num_output_tokens,
            one.num_cached_tokens,
            one.seconds,
            one.output_tokens_per_s,
            one.tokens_per_s,
            one.num_steps,
        ]
        for one in runs
    ]
    return table([*header, "preemptions"], [[*row, one.num_preemptions] for row, one in zip(rows, runs, strict=True)])
