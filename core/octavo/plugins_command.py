"""`octavo plugins`: what is installed, what failed, and why a provider would be chosen for a model."""

import json
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from octavo.config_args import add_engine_arguments, engine_config
from octavo.errors import ConfigError
from octavo.plugins.kinds import KINDS
from octavo.plugins.loading import LoadedProvider, Plugins, load_plugins

if TYPE_CHECKING:
    from octavo.device import DeviceInfo


class PluginsCommand:
    """`octavo plugins list` and `octavo plugins why MODEL`."""

    help = "List the installed plugins and what they offer, or explain which providers a model would get and why."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the two subcommands."""
        subcommands = parser.add_subparsers(dest="action", required=True, metavar="list|why")
        text = "plugins, their providers by kind, and what failed"
        listing = subcommands.add_parser("list", help=text, description=text)
        listing.add_argument("--json", action="store_true", help="print JSON")
        text = "which provider of each kind a model would get, and why not the others"
        why = subcommands.add_parser("why", help=f"{text}; --device sm_90 asks for another GPU", description=text)
        why.add_argument("--json", action="store_true", help="print JSON")
        add_engine_arguments(why)

    def run(self, args: Namespace) -> int:
        """Print the answer; 0 even when every plugin is broken."""
        return _list(args.json) if args.action == "list" else _why(args)


def _list(as_json: bool) -> int:
    plugins = load_plugins(warn=False)
    print(json.dumps(listing(plugins), indent=2) if as_json else listing_text(plugins))
    return 0


def listing(plugins: Plugins) -> dict[str, Any]:
    """Plugins, providers by kind and failures, as JSON can hold them."""
    return {
        "plugins": [asdict(plugin) for plugin in plugins.plugins],
        "providers": {kind: [_provider(one) for one in plugins.providers(kind)] for kind in KINDS},
        "failures": [asdict(failure) for failure in plugins.failures],
    }


def _provider(loaded: LoadedProvider) -> dict[str, Any]:
    names = ("name", "summary", "priority", "api", "plugin", "distribution", "version", "builtin")
    return {name: getattr(loaded, name) for name in names}


def listing_text(plugins: Plugins) -> str:
    """The same for a reader."""
    rows = [
        (one.name, f"{one.distribution} {one.version}", "built in" if one.builtin else "", one.entry_point)
        for one in plugins.plugins
    ]
    lines = ["Plugins", *_columns(rows, "  "), "", "Providers"]
    for kind, info in KINDS.items():
        providers = plugins.providers(kind)
        if providers:
            lines.append(f"  {info.title}{f' ({info.flag})' if info.flag else ''}")
            lines += _columns([(one.name, f"[{one.plugin}]", one.summary) for one in providers], "    ")
    if plugins.failures:
        lines += ["", "Failures", *(f"  {failure}" for failure in plugins.failures)]
    return "\n".join(lines)


def _columns(rows: Sequence[tuple[str, ...]], indent: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def _why(args: Namespace) -> int:
    device = getattr(args, "device", "auto")
    architecture = re.fullmatch(r"sm_(\d+)(\d)[a-z]?", device)
    if architecture:
        args.device = "cuda"
    config = engine_config(args)
    plugins = load_plugins(config.plugins, config.disable_plugin)
    from octavo.start import explain  # imports torch

    selections = explain(config, plugins, _device(device if architecture else config.device, architecture))
    if args.json:
        print(json.dumps([selection.as_dict() for selection in selections], indent=2))
    else:
        print("\n".join(dict.fromkeys(selection.for_human() for selection in selections)))  # layers repeat
    return 0


def _device(name: str, architecture: re.Match[str] | None) -> "DeviceInfo":
    from octavo.device import DeviceInfo, current_device

    if architecture:
        return DeviceInfo("cuda", name, (int(architecture[1]), int(architecture[2])))
    try:
        return current_device(name)
    except (RuntimeError, AssertionError) as error:  # torch without a driver, or built for the CPU
        raise ConfigError(
            f"There is no {name} device here; --device sm_90 describes a GPU that is elsewhere."
        ) from error
