"""`octavo bench`: one benchmark a module."""

from argparse import ArgumentParser, Namespace
from importlib import import_module
from typing import Protocol

_SUBCOMMANDS = {
    "cpu": "speed against transformers' generate, time to ready and peak memory",
    "offline": "tokens per second of workloads",
    "serve": "latency and throughput of a server",
    "startup": "the time from the start of a process until it is ready",
    "kv-waste": "the share of the KV cache that is allocated and not used",
    "prefix": "what a repeated prompt costs",
}


class Subcommand(Protocol):
    """What each benchmark's module holds."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the benchmark's flags."""

    def run(self, args: Namespace) -> int:
        """Run it; 1 if a mark that was given is missed."""


class BenchCommand:
    """The command `octavo bench`."""

    help = "Measure the engine. docs/performance.md says what each benchmark measures and how to repeat it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add a subcommand for each benchmark."""
        subcommands = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(_SUBCOMMANDS))
        for name, text in _SUBCOMMANDS.items():
            subparser = subcommands.add_parser(name, help=text, description=f"Measure {text}.")
            subparser.add_argument("--json", metavar="FILE", help="write the result to FILE as well")
            subcommand(name).add_arguments(subparser)

    def run(self, args: Namespace) -> int:
        """Run the benchmark that was named."""
        from octavo_workbench.report import check_writable

        check_writable(args.json)
        return subcommand(args.benchmark).run(args)


def subcommand(name: str) -> Subcommand:
    """The module of a benchmark."""
    return import_module(f"octavo_workbench.bench.{name.replace('-', '_')}")
