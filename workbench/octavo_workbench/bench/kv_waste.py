"""`octavo bench kv-waste`: how much of the allocated KV cache holds nothing, read from the engine's gauge each step."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, replace

from octavo.config_args import add_engine_arguments
from octavo.engine.step import EngineStats

from octavo_workbench.bench.arguments import positive, positives, ratio
from octavo_workbench.bench.offline import add_shape_argument, shaped_config
from octavo_workbench.report import table, verdict, write_json
from octavo_workbench.session import Session
from octavo_workbench.workloads import LONGEST_OUTPUT, LONGEST_PROMPT, sharegpt_like

RESERVED_SLOTS = LONGEST_PROMPT + LONGEST_OUTPUT
"""What a request would hold if its longest possible length were set aside for it."""


@dataclass(slots=True)
class WasteGauge:
    """Sums of the engine's gauge over the steps that generated at least one token.

    The gauge is read after each step and weighted with the seconds that the step took: a share is a mean over time.
    """

    seconds: float = 0.0
    wasted: float = 0.0
    wasted_reserved: float = 0.0
    slot_seconds: float = 0.0
    token_seconds: float = 0.0
    num_steps: int = 0
    _num_generated: int = 0

    def __call__(self, seconds: float, stats: EngineStats) -> None:
        """Take in one step."""
        generates = stats.num_generated_tokens > self._num_generated
        self._num_generated = stats.num_generated_tokens
        if not generates or not stats.kv_slots:  # the last step leaves nothing allocated
            return
        self.num_steps += 1
        self.seconds += seconds
        self.wasted += seconds * (1 - stats.kv_tokens / stats.kv_slots)
        self.wasted_reserved += seconds * (1 - stats.kv_tokens / (stats.num_running * RESERVED_SLOTS))
        self.slot_seconds += seconds * stats.kv_slots
        self.token_seconds += seconds * stats.kv_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    """Shares from 0 to 1: the time-weighted mean of the wasted share, the wasted part of all slot-seconds, and what
    reserving 1024 + 1024 tokens for each running request would waste at the same moments."""

    block_size: int
    mean_over_time: float
    of_slot_seconds: float
    if_reserved: float
    num_steps: int
    seconds: float


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's flags and the engine's."""
    text = "sizes to measure (default: 16,32,64)"
    parser.add_argument("--block-sizes", type=positives, default=[16, 32, 64], metavar="N,N", help=text)
    text = "requests of the ShareGPT-like workload (default: 512)"
    parser.add_argument("--num-requests", type=positive, default=512, metavar="N", help=text)
    text = "exit with 1 if the first block size wastes more than this many per cent"
    parser.add_argument("--max-waste", type=ratio, metavar="PERCENT", help=text)
    add_shape_argument(parser)
    add_engine_arguments(parser)


def run(args: Namespace) -> int:
    """Print the waste at each block size; 1 if the first is above `--max-waste`."""
    with shaped_config(args, "tiny") as config:
        sizes = [replace(config, block_size=size) for size in args.block_sizes]
        wastes = [measure(Session(one), args.num_requests, config.progress) for one in sizes]
    header = ["block size", "wasted % (mean over time)", "of slot-seconds %", "if reserved %", "steps", "seconds"]
    print(table(header, [_row(waste) for waste in wastes]))
    write_json(args.json, {"benchmark": "kv-waste", "block_sizes": [asdict(waste) for waste in wastes]})
    first = wastes[0]
    if args.max_waste is None or 100 * first.mean_over_time <= args.max_waste:
        return 0
    return verdict([f"{100 * first.mean_over_time:.2f}% at block size {first.block_size}, not {args.max_waste:g}%"])


def _row(waste: Waste) -> list[object]:
    shares = (waste.mean_over_time, waste.of_slot_seconds, waste.if_reserved)
    return [waste.block_size, *(100 * share for share in shares), waste.num_steps, waste.seconds]


def measure(session: Session, num_requests: int, progress: bool = False) -> Waste:
    """The waste while a fresh session runs the workload, all requests at once; ends the session."""
    gauge = WasteGauge()
    block_size = session.info.block_size
    with session:
        name = f"Blocks of {block_size}" if progress else ""
        seconds = session.run(sharegpt_like(num_requests), observe=gauge, progress=name).seconds
    return Waste(
        block_size=block_size,
        mean_over_time=gauge.wasted / gauge.seconds,
        of_slot_seconds=1 - gauge.token_seconds / gauge.slot_seconds,
        if_reserved=gauge.wasted_reserved / gauge.seconds,
        num_steps=gauge.num_steps,
        seconds=seconds,
    )
