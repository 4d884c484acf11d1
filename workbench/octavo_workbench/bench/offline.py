"""`octavo bench offline`: tokens per second of workloads on the engine in this process, and the floor beneath them."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.config_args import add_engine_arguments, engine_config
from octavo.errors import ConfigError

from octavo_workbench.bench.arguments import positive
from octavo_workbench.report import table, write_json
from octavo_workbench.session import Run, Session
from octavo_workbench.workloads import SHAPES, WORKLOADS, Job, model_of_shape, workload

if TYPE_CHECKING:
    from octavo.testing.ceilings import Ceilings

    from octavo_workbench.floor import Floor, ModelCost

_WARMUP_REQUESTS = 32
_WARMUP_TOKENS = 16


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's flags and the engine's."""
    names = ", ".join(WORKLOADS)
    text = f"{names}, or REQUESTSxINxOUT; several with commas between them run on one engine"
    parser.add_argument("--workload", default="sharegpt512", metavar="NAME", help=text)
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


@dataclass(frozen=True, slots=True)
class Measured:
    """A workload's runs, and the floor under it."""

    name: str
    runs: list[Run]
    floor: "Floor"

    @property
    def best(self) -> Run:
        """The fastest run."""
        return min(self.runs, key=lambda run: run.seconds)

    def as_dict(self, ceilings: "Ceilings") -> dict[str, Any]:
        """The best rates, the floor and its share, and every run."""
        best = self.best
        return {
            "workload": self.name,
            "output_tokens_per_s": best.output_tokens_per_s,
            "tokens_per_s": best.tokens_per_s,
            "floor": asdict(self.floor),
            "floor_output_tokens_per_s": best.num_output_tokens / self.floor.seconds,
            "of_floor": self.floor.seconds / best.seconds,
            **self.rates(ceilings),
            "runs": [asdict(one) for one in self.runs],
        }

    def rates(self, ceilings: "Ceilings") -> dict[str, float]:
        """What the ideal steps read and compute, by the best run's time, and its shares of the ceilings (0 to 1)."""
        bytes_per_s, flops_per_s = (x / self.best.seconds for x in (self.floor.num_bytes, self.floor.num_flops))
        return {
            "gb_per_s": bytes_per_s / 1e9,
            "of_copy": bytes_per_s / ceilings.bytes_per_s,
            "tflop_per_s": flops_per_s / 1e12,
            "of_matmul": flops_per_s / ceilings.flops_per_s,
        }


def run(args: Namespace) -> int:
    """Print the rates; 1 if the prefix cache served anything, since the rates then mean something else."""
    work = {name: workload(name)[: args.num_requests] for name in map(str.strip, args.workload.split(","))}
    with shaped_config(args) as config:
        ceilings = _ceilings(config)
        with Session(config) as session:
            cost = _cost(config, session)
            measured = [
                Measured(
                    name,
                    measure(session, jobs, args.runs, name if config.progress else ""),
                    _floor(jobs, cost, ceilings),
                )
                for name, jobs in work.items()
            ]
            details = asdict(session.info) | ({"model": args.shape} if args.shape else {})
    print(_table(measured))
    print(f"ceilings: {ceilings}")
    print(_shares(measured, ceilings))
    results = [one.as_dict(ceilings) for one in measured]
    write_json(
        args.json,
        {"benchmark": "offline", "workloads": results, "ceilings": asdict(ceilings), "engine": details},
    )
    if any(one.num_cached_tokens for workload in measured for one in workload.runs):
        print("failed: prompt tokens came from the prefix cache, so these are no rates of this workload")
        return 1
    return 0


def _ceilings(config: EngineConfig) -> "Ceilings":
    """Measured before the engine takes the memory."""
    import torch
    from octavo.device import current_device
    from octavo.testing.ceilings import measure_ceilings

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = current_device(config.device)
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    return measure_ceilings(device.type, dtype)


def _cost(config: EngineConfig, session: Session) -> "ModelCost":
    """What the running model reads and computes."""
    import torch
    from octavo.checkpoints import open_model
    from octavo.plugins.loading import load_plugins

    from octavo_workbench.floor import model_cost

    plugins, info = load_plugins(config.plugins, config.disable_plugin, warn=False), session.info
    reader = open_model(config, plugins).reader
    try:
        checkpoint = reader.config
    finally:
        reader.close()
    known = [one for one in plugins.providers("model") if one.name in checkpoint["architectures"]]
    model: Any = known[0].load()
    shape = model.read_config(checkpoint)
    return model_cost(shape, info.memory["weights"], info.kv_bytes_per_token, getattr(torch, info.dtype).itemsize)


def _floor(jobs: Sequence[Job], cost: "ModelCost", ceilings: "Ceilings") -> "Floor":
    from octavo_workbench.floor import floor_of

    return floor_of(jobs, cost, ceilings)


def measure(session: Session, jobs: list[Job], num_runs: int, progress: str = "") -> list[Run]:
    """Runs of a workload after a short warm-up, each with an empty prefix cache; `progress` names their bars."""
    session.run([Job(job[0], min(job[1], _WARMUP_TOKENS)) for job in jobs[:_WARMUP_REQUESTS]])
    runs = []
    for number in range(1, num_runs + 1):
        session.engine.reset_prefix_cache()
        runs.append(session.run(jobs, progress=f"{progress}, run {number} of {num_runs}" if progress else ""))
    return runs


def _table(measured: Sequence[Measured]) -> str:
    """Every run of every workload."""
    header = ["workload", "requests", "tokens in", "out", "cached", "seconds", "output tok/s", "tok/s", "steps"]
    rows: list[list[object]] = [
        [
            workload.name,
            one.num_requests,
            one.num_prompt_tokens,
            one.num_output_tokens,
            one.num_cached_tokens,
            one.seconds,
            one.output_tokens_per_s,
            one.tokens_per_s,
            one.num_steps,
            one.num_preemptions,
        ]
        for workload in measured
        for one in workload.runs
    ]
    return table([*header, "preemptions"], rows)


def _shares(measured: Sequence[Measured], ceilings: "Ceilings") -> str:
    """The best run of each workload beside its floor."""
    header = ["best of", "output tok/s", "tok/s", "floor: output tok/s", "% of floor", "GB/s", "% copy", "TFLOP/s"]
    rows: list[list[object]] = []
    for one in measured:
        rates, best = one.rates(ceilings), one.best
        floor = best.num_output_tokens / one.floor.seconds
        row = [one.name, best.output_tokens_per_s, best.tokens_per_s, floor, 100 * one.floor.seconds / best.seconds]
        row += [rates["gb_per_s"], 100 * rates["of_copy"], rates["tflop_per_s"], 100 * rates["of_matmul"]]
        rows.append(row)
    return table([*header, "% matmul"], rows)
