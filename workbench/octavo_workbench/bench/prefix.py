"""`octavo bench prefix`: the same prompt twice, and what the second costs."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from statistics import median

from octavo.config_args import add_engine_arguments
from octavo.errors import ConfigError

from octavo_workbench.bench.arguments import positive, ratio
from octavo_workbench.bench.offline import add_shape_argument, shaped_config
from octavo_workbench.report import table, verdict, write_json
from octavo_workbench.session import Session
from octavo_workbench.workloads import fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """Prefill of a prompt, up to its first token, before and after it is cached."""

    num_cached_tokens: int
    first_seconds: float
    second_seconds: float

    @property
    def speedup(self) -> float:
        """How many times shorter the second prefill is."""
        return self.first_seconds / self.second_seconds


def add_arguments(parser: ArgumentParser) -> None:
    """Add the benchmark's flags and the engine's."""
    text = "length of the prompt (default: 512)"
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N", help=text)
    text = "prompts; the medians count (default: 5)"
    parser.add_argument("--runs", type=positive, default=5, metavar="N", help=text)
    text = "exit with 1 if the second prefill is not this many times shorter"
    parser.add_argument("--min-speedup", type=ratio, metavar="X", help=text)
    add_shape_argument(parser)
    add_engine_arguments(parser)


def run(args: Namespace) -> int:
    """Print cached tokens and times; 1 if full blocks were missed or `--min-speedup` was."""
    with shaped_config(args) as config:
        if not config.enable_prefix_caching:
            raise ConfigError("This benchmark measures prefix caching: leave out --no-enable-prefix-caching.")
        with Session(config) as session:
            repeats = measure(session, args.prompt_tokens, args.runs)
            block_size = session.info.block_size
    speedup = median(one.speedup for one in repeats)
    print(_table(repeats))
    print(f"median: the second prefill is {speedup:.1f} times shorter")
    pairs = [asdict(one) for one in repeats]
    write_json(args.json, {"benchmark": "prefix", "speedup": speedup, "prompts": pairs})
    return verdict(_failures(repeats, speedup, args, block_size))


def _failures(repeats: list[Repeat], speedup: float, args: Namespace, block_size: int) -> list[str]:
    # One token must be left to compute, and only full blocks are shared.
    expected = (args.prompt_tokens - 1) // block_size * block_size
    cached = min(one.num_cached_tokens for one in repeats)
    failures = [] if cached >= expected else [f"{cached} tokens were cached, not {expected}"]
    if args.min_speedup is not None and speedup < args.min_speedup:
        failures.append(f"{speedup:.1f} times shorter, not {args.min_speedup:g}")
    return failures


def measure(session: Session, num_prompt_tokens: int, num_prompts: int) -> list[Repeat]:
    """Prefill each of some random prompts twice, after a warm-up with one more."""
    warmup, *jobs = fixed(num_prompts + 1, num_prompt_tokens, 1)
    for _ in range(2):
        session.run([warmup])
    repeats = []
    for job in jobs:
        first, second = session.run([job]), session.run([job])
        repeats.append(
            Repeat(
                num_cached_tokens=second.num_cached_tokens,
                first_seconds=first.seconds,
                second_seconds=second.seconds,
            )
        )
    return repeats


def _table(repeats: list[Repeat]) -> str:
    header = ["cached tokens", "first prefill ms", "second ms", "times shorter"]
    rows = [[r.num_cached_tokens, 1e3 * r.first_seconds, 1e3 * r.second_seconds, r.speedup] for r in repeats]
    return table(header, rows)
