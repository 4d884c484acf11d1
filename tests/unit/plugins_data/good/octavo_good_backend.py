"""What the good plugin offers; imported only when it is considered."""

from argparse import ArgumentParser, Namespace
from typing import Any


class Quick:
    """Serves anything without features, unless its options ask for too many splits."""

    features: frozenset[str] = frozenset({"window"})

    @staticmethod
    def why_not(spec: Any, options: Any) -> str | None:
        """One sentence when there are too many splits."""
        splits = getattr(options, "splits", 0)
        return f"{splits} splits are more than 64." if splits > 64 else None


class GreetCommand:
    """`octavo good_command NAME`."""

    help = "Greet someone."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add NAME."""
        parser.add_argument("name")

    def run(self, args: Namespace) -> int:
        """Print the greeting."""
        print(f"Hello {args.name}")
        return 5
