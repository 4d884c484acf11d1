"""`octavo compare`: two or more providers of one kind, their errors and their times side by side."""

from argparse import ArgumentParser, Namespace
from importlib import import_module
from typing import Protocol

_SUBCOMMANDS = {
    "attention": "attention backends on paged batches of a model's shape",
    "ops": "fused ops on a model's shape",
}


class Subcommand(Protocol):
    """What each comparison's module holds."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the comparison's flags."""

    def run(self, args: Namespace) -> int:
        """Compare; 1 if a mark that was given is missed."""


class CompareCommand:
    """The command `octavo compare`."""

    help = "Compare providers: their errors against a float64 oracle, then their speed. See docs/performance.md."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add a subcommand for each kind of provider."""
        subcommands = parser.add_subparsers(dest="kind", required=True, metavar="|".join(_SUBCOMMANDS))
        for name, text in _SUBCOMMANDS.items():
            subparser = subcommands.add_parser(name, help=text, description=f"Compare {text}.")
            subcommand(name).add_arguments(subparser)

    def run(self, args: Namespace) -> int:
        """Run the comparison that was named."""
        from octavo_workbench.report import check_writable

        check_writable(args.json)
        return subcommand(args.kind).run(args)


def subcommand(name: str) -> Subcommand:
    """The module of a comparison."""
    return import_module(f"octavo_workbench.compare.{name}")
