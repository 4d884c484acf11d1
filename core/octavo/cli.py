"""The command `octavo`: finds the subcommand's plugin, reads its flags and runs it. Imports nothing heavy itself."""

import os
import re
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from octavo import __version__
from octavo.config_args import environment_plugins
from octavo.errors import ConfigError, OctavoError
from octavo.plugins.loading import Plugins, load_plugins
from octavo.plugins.records import Command
from octavo.plugins.values import nearest

_FLAG = re.compile(r"--[A-Za-z][\w-]*(=|$)")
LIST_HINT = "`octavo plugins list` shows what is installed and what failed."


class Parser(ArgumentParser):
    """An argument parser with `-` and `_` alike, no abbreviations, and errors that name the nearest flag.

    Raises ConfigError where argparse would exit.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # type: ignore[arg-type]

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """Parse all of `args`; nothing is left over, since an unknown argument is an error."""
        given = _normalised(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(given, namespace)
        if unknown:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            name = unknown[0].partition("=")[0]
            what = "flag" if name.startswith("-") else "argument, or one too many"
            raise ConfigError(f"{self.prog}: {name} is not a known {what}.{nearest(name, known)}")
        return parsed, []

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.prog}: {message}. `{self.prog} --help` lists the arguments.")


def _normalised(args: Sequence[str]) -> list[str]:
    """`--max_model_len` as `--max-model-len`, up to a bare `--`; values stay as they are."""
    end = args.index("--") if "--" in args else len(args)
    return [_normalised_flag(arg) for arg in args[:end]] + list(args[end:])


def _normalised_flag(arg: str) -> str:
    if not _FLAG.match(arg):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def main(argv: Sequence[str] | None = None) -> int:
    """Run `octavo` with these arguments (default: the process's).

    Returns the exit code: 2 for a configuration error, 1 for another one, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    if arguments and not arguments[0].startswith("-"):
        return _run_command(arguments[0], arguments[1:])
    parser = Parser(prog="octavo", add_help=False, usage="octavo [-h] [--version] COMMAND ...")
    parser.add_argument("-h", "--help", action="store_true", help=SUPPRESS)
    parser.add_argument("--version", action="store_true", help=SUPPRESS)
    args = parser.parse_args(arguments)
    if args.version:
        print(f"octavo {__version__}")
        return 0
    print(_help(), file=sys.stdout if args.help else sys.stderr)
    return 0 if args.help else 2


def _run_command(name: str, arguments: list[str]) -> int:
    command = _find(name)
    parser = Parser(prog=f"octavo {name}", description=command.help)
    try:
        command.add_arguments(parser)
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    return command.run(args)


def _find(name: str) -> Command:
    """The command of that name. Third-party plugins are imported only when no built-in one has it."""
    builtin = load_plugins(only=(), warn=False)
    if all(one.name != name for one in builtin.providers("command")):
        if name == "plugins":  # works even when nothing loads
            from octavo.plugins_command import PluginsCommand

            return PluginsCommand()
        builtin = _all_plugins()
    command: Command = builtin.get("command", name).load()()
    return command


def _all_plugins() -> Plugins:
    return load_plugins(environment_plugins(), warn=False)


def _help() -> str:
    try:
        plugins, trouble = _all_plugins(), ""
    except OctavoError as error:  # what the environment names has failed; help is given all the same
        plugins, trouble = load_plugins(only=(), warn=False), str(error)
    commands = {one.name: one.summary for one in plugins.providers("command")}
    width = max(map(len, commands), default=0)
    lines = ["usage: octavo COMMAND ...", "       octavo COMMAND --help", "       octavo --version", "", "commands:"]
    lines += [f"  {name.ljust(width)}  {summary}" for name, summary in sorted(commands.items())]
    broken = sorted({failure.plugin for failure in plugins.failures})
    if broken:
        lines += ["", f"Plugins that failed: {', '.join(broken)}. {LIST_HINT}"]
    lines += ["", trouble] if trouble else []
    return "\n".join(lines)
