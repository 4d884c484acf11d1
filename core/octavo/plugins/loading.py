"""Find the plugins, load each by itself, and record what each offers or why it failed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

import pluggy
from octavo.errors import ConfigError, PluginError
from octavo.plugins.hookspecs import HookSpecs
from octavo.plugins.kinds import KINDS
from octavo.plugins.records import PROJECT, Provider
from octavo.plugins.registry import (
    LoadedPlugin,
    LoadedProvider,
    PluginFailure,
    Plugins,
    describe_error,
    failure_of,
    logger,
)
from octavo.plugins.values import nearest

GROUP = "octavo"
DISTRIBUTION = "octavo"

__all__ = ["LoadedPlugin", "LoadedProvider", "PluginFailure", "Plugins", "load_plugins"]


def load_plugins(
    only: Sequence[str] | None = None,
    disable: Sequence[str] = (),
    *,
    entry_points: Iterable[EntryPoint] | None = None,
    warn: bool = True,
) -> Plugins:
    """Load every plugin, or with `only` the built-in ones and those named; never those named in `disable`.

    A plugin that fails is recorded, with one warning (unless `warn` is false), and keeps nobody else from loading.
    Raises PluginError when one named in `only` fails, ConfigError when a name is unknown.
    """
    loader = _Loader()
    found = list(_installed(loader)) if entry_points is None else list(entry_points)
    sources = sorted(((_source(entry), entry) for entry in found), key=_load_order)
    _check_names(sources, [*(only or ()), *disable])
    for source, entry in sources:
        if source.name not in disable and (only is None or source.builtin or source.name in only):
            loader.load(source, entry)
    plugins = Plugins.of(loader.plugins, loader.failures, loader.providers, loader.manager)
    _report(plugins, only or (), warn)
    return plugins


def _installed(loader: "_Loader") -> Iterator[EntryPoint]:
    try:
        yield from metadata.entry_points(group=GROUP)
        return
    except Exception as error:  # damaged metadata of one distribution: read them one by one
        logger.debug("Reading all entry points failed: %s", describe_error(error))
    for distribution in metadata.distributions():
        try:
            yield from distribution.entry_points.select(group=GROUP)
        except Exception as error:
            source = LoadedPlugin(str(getattr(distribution, "_path", "unknown")), "unknown", "", "entry_points.txt")
            loader.failures.append(failure_of(source, "import", describe_error(error)))


def _source(entry: EntryPoint) -> LoadedPlugin:
    name = entry.dist.name if entry.dist else "unknown"
    version = entry.dist.version if entry.dist else ""
    return LoadedPlugin(entry.name, name, version, entry.value, builtin=name == DISTRIBUTION)


def _load_order(pair: tuple[LoadedPlugin, EntryPoint]) -> tuple[bool, str, str]:
    source = pair[0]
    return not source.builtin, source.name, source.distribution


def _check_names(sources: Sequence[tuple[LoadedPlugin, EntryPoint]], names: Sequence[str]) -> None:
    known = [source.name for source, _ in sources]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"No plugin is called {name!r}. Installed: {', '.join(known) or 'none'}.{nearest(name, known)}"
            )


def _report(plugins: Plugins, named: Sequence[str], warn: bool) -> None:
    by_plugin: dict[tuple[str, str], list[PluginFailure]] = {}
    for failure in plugins.failures:
        by_plugin.setdefault((failure.plugin, failure.distribution), []).append(failure)
    for (name, _), failures in by_plugin.items():
        message = "; ".join(map(str, failures))
        if name in named:
            raise PluginError(f"The configuration names a plugin that fails: {message}.")
        if warn:
            logger.warning("The %s. The engine goes on without it.", message)


class _Refusal(Exception):
    """A plugin is refused as a whole, at a stage, for a reason."""

    def __init__(self, stage: str, error: str) -> None:
        super().__init__(error)
        self.stage = stage
        self.error = error


class _Loader:
    """Gathers plugins, providers and failures; `manager` knows only the plugins that loaded."""

    def __init__(self) -> None:
        self.manager = _new_manager()
        self.plugins: list[LoadedPlugin] = []
        self.providers: list[LoadedProvider] = []
        self.failures: list[PluginFailure] = []

    def load(self, source: LoadedPlugin, entry: EntryPoint) -> None:
        try:
            self._check_name(source)
            module = _import(entry)
            offered = _offers(module, source)
            self._register(module, source)
        except _Refusal as refusal:
            self.failures.append(failure_of(source, refusal.stage, refusal.error))
            return
        self.plugins.append(source)
        for provider in offered:
            self._add(provider)

    def _check_name(self, source: LoadedPlugin) -> None:
        for other in self.plugins:
            if other.name == source.name:
                raise _Refusal("duplicate", f"the {other} already has that name")

    def _register(self, module: Any, source: LoadedPlugin) -> None:
        try:
            self.manager.register(module, source.name)
        except Exception as error:
            raise _Refusal("register", describe_error(error)) from error

    def _add(self, new: LoadedProvider) -> None:
        kind = KINDS[new.kind]
        if new.api not in kind.accepted:
            served = " and ".join(map(str, kind.accepted))
            self._refuse(new, "api", f"is written for api {new.api}, but this core serves api {served}")
            return
        for other in self.providers:
            if (other.kind, other.name) == (new.kind, new.name):
                self._refuse(new, "duplicate", f"has a name that the {other.source} already offers")
                return
        self.providers.append(new)

    def _refuse(self, new: LoadedProvider, stage: str, why: str) -> None:
        error = f"its {KINDS[new.kind].title} {new.name!r} {why}"
        self.failures.append(failure_of(new.source, stage, error, new))


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    return manager


def _import(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except (Exception, SystemExit) as error:
        raise _Refusal("import", describe_error(error)) from error


def _offers(module: Any, source: LoadedPlugin) -> list[LoadedProvider]:
    """The plugin's providers, asked for in a manager of its own so that whatever fails is its own failure."""
    manager = _new_manager()
    try:
        manager.register(module, source.name)
    except pluggy.PluginValidationError as error:
        raise _Refusal("hook", describe_error(error)) from error
    except (Exception, SystemExit) as error:
        raise _Refusal("register", describe_error(error)) from error
    _check_hooks(manager, module)
    return [
        LoadedProvider.of(kind, provider, source) for kind in KINDS for provider in _call(manager, KINDS[kind].hook)
    ]


def _check_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    callers = manager.get_hookcallers(module) or []
    if not callers:
        raise _Refusal("register", "it has no hook: mark its hook functions with @octavo.hookimpl")
    known = [name for name in dir(HookSpecs) if name.startswith("octavo_")]
    for caller in callers:
        optional = all(implementation.optionalhook for implementation in caller.get_hookimpls())
        if not caller.has_spec() and not optional:
            raise _Refusal("hook", f"{caller.name!r} is not a hook.{nearest(caller.name, known)}")


def _call(manager: pluggy.PluginManager, hook: str) -> list[Provider]:
    caller = getattr(manager.hook, hook)
    if not caller.get_hookimpls():
        return []
    try:
        results = caller()
    except (Exception, SystemExit) as error:
        raise _Refusal("call", f"{hook} raised {describe_error(error)}") from error
    if not results:  # pluggy leaves out None
        raise _Refusal("call", f"{hook} returned None, not a list of Provider")
    return [_checked(hook, provider) for result in results for provider in _as_list(hook, result)]


def _as_list(hook: str, result: object) -> list[Any]:
    if not isinstance(result, list):
        raise _Refusal("call", f"{hook} returned a {type(result).__name__}, not a list of Provider")
    return result


def _checked(hook: str, provider: object) -> Provider:
    if not isinstance(provider, Provider):
        raise _Refusal("call", f"{hook} returned a list that holds a {type(provider).__name__}, not only Provider")
    name, factory, options = provider.name, provider.factory, provider.options
    if not name or not isinstance(name, str) or any(sign in name for sign in ":,= \t\n"):
        raise _Refusal("call", f"{hook} offers the name {name!r}: it must have no colon, comma, equals sign or space")
    if not (callable(factory) or (isinstance(factory, str) and all(factory.partition(":")))):
        raise _Refusal("call", f"{hook}: the factory of {name!r} is {factory!r}, not a class or 'module:Class'")
    if options is not None and not (isinstance(options, type) and is_dataclass(options)):
        raise _Refusal("call", f"{hook}: the options of {name!r} are {options!r}, not a dataclass type")
    return provider
