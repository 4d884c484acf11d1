"""What was loaded: plugins, their providers and the failures, as one immutable value."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

import pluggy
from octavo.errors import ConfigError, PluginError
from octavo.plugins.kinds import KINDS
from octavo.plugins.records import Provider
from octavo.plugins.values import nearest

logger = logging.getLogger("octavo.plugins")


def describe_error(error: BaseException) -> str:
    """An exception on one line: its type and its words."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A plugin: its entry point's name and module, and the distribution that brought it."""

    name: str
    distribution: str
    version: str
    entry_point: str
    builtin: bool = False

    def __str__(self) -> str:
        origin = f"{self.distribution} {self.version}".strip()
        return f"plugin {self.name!r} ({origin}, {self.entry_point})"


@dataclass(frozen=True, slots=True)
class PluginFailure:
    """A plugin, or one provider of it, that failed. `stage` says when:

    import, register, hook (unknown or with wrong arguments), call (of a hook), api, duplicate; later factory,
    construct, warmup, canary. `kind` and `provider` name the provider where only that one failed.
    """

    plugin: str
    distribution: str
    version: str
    entry_point: str
    stage: str
    error: str
    kind: str | None = None
    provider: str | None = None

    def __str__(self) -> str:
        source = LoadedPlugin(self.plugin, self.distribution, self.version, self.entry_point)
        return f"{source} failed at stage {self.stage!r}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedProvider(Provider):
    """A provider together with its kind and the plugin that offers it."""

    kind: str
    source: LoadedPlugin

    @classmethod
    def of(cls, kind: str, provider: Provider, source: LoadedPlugin) -> "LoadedProvider":
        """The provider that a plugin's hook for `kind` returned."""
        return cls(**{item.name: getattr(provider, item.name) for item in fields(Provider)}, kind=kind, source=source)

    @property
    def plugin(self) -> str:
        """The name of the plugin that offers it."""
        return self.source.name

    @property
    def distribution(self) -> str:
        """The distribution that brought the plugin."""
        return self.source.distribution

    @property
    def version(self) -> str:
        """The distribution's version."""
        return self.source.version

    @property
    def builtin(self) -> bool:
        """Whether it comes with Octavo itself."""
        return self.source.builtin

    @property
    def unasked(self) -> bool:
        """Whether it may serve without being named."""
        return self.builtin and self.automatic

    def __str__(self) -> str:
        return f"{KINDS[self.kind].title} {self.name!r} of {self.source}"

    def load(self) -> Callable[..., Any]:
        """The provider's class, imported now. Raises PluginError that says whose it is."""
        factory = self.factory
        if not isinstance(factory, str):
            return factory
        module, _, attribute = factory.partition(":")
        try:
            loaded = getattr(import_module(module), attribute)
        except (Exception, SystemExit) as error:
            raise PluginError(f"The {self} cannot be imported from {factory}: {describe_error(error)}.") from error
        if not callable(loaded):
            raise PluginError(f"The {self} is to be a class, but {factory} is a {type(loaded).__name__}.")
        return loaded  # type: ignore[no-any-return]


def _order(loaded: LoadedProvider) -> tuple[bool, int, str]:
    return not loaded.builtin, -loaded.priority, loaded.name


@dataclass(frozen=True, slots=True)
class Plugins:
    """Everything that `load_plugins` found. Immutable; `hook` calls the hooks of all loaded plugins."""

    plugins: tuple[LoadedPlugin, ...]
    failures: tuple[PluginFailure, ...]
    manager: pluggy.PluginManager = field(repr=False, compare=False)
    by_kind: Mapping[str, tuple[LoadedProvider, ...]] = field(repr=False)

    @classmethod
    def of(
        cls,
        plugins: Sequence[LoadedPlugin],
        failures: Sequence[PluginFailure],
        providers: Sequence[LoadedProvider],
        manager: pluggy.PluginManager,
    ) -> "Plugins":
        """The value, with the providers of each kind in order: built-in ones first, then by priority and name."""
        by_kind = {kind: tuple(sorted((one for one in providers if one.kind == kind), key=_order)) for kind in KINDS}
        return cls(tuple(plugins), tuple(failures), manager, MappingProxyType(by_kind))

    @property
    def hook(self) -> pluggy.HookRelay:
        """Calls a hook on every loaded plugin: `plugins.hook.octavo_choose(...)`."""
        return self.manager.hook

    def providers(self, kind: str) -> tuple[LoadedProvider, ...]:
        """All providers of a kind (a key of KINDS): built-in ones first, then by priority and name."""
        return self.by_kind[kind]

    def get(self, kind: str, name: str) -> LoadedProvider:
        """The provider of that kind and name.

        Raises PluginError when it was refused, is offered by two plugins, or a failed plugin might have offered it;
        ConfigError when nobody is known by that name.
        """
        found = next((one for one in self.providers(kind) if one.name == name), None)
        refused = self.refused(kind, name)
        if found is None:
            raise self._unknown(kind, name, refused)
        twins = [failure for failure in refused if failure.stage == "duplicate"]
        if twins and not found.builtin:  # which of the two would serve is an accident of their names
            raise PluginError(
                f"The {found} is not the only one of that name: {'; '.join(map(str, twins))}. "
                "Load only one of them, with --plugins or --disable-plugin."
            )
        return found

    def refused(self, kind: str, name: str | None = None) -> tuple[PluginFailure, ...]:
        """The failures of single providers of a kind, and of one name if it is given."""
        return tuple(one for one in self.failures if one.kind == kind and one.provider and name in (None, one.provider))

    def _unknown(self, kind: str, name: str, refused: Sequence[PluginFailure]) -> PluginError | ConfigError:
        title = KINDS[kind].title
        if refused:
            return PluginError(f"The {title} {name!r} cannot serve: {'; '.join(map(str, refused))}.")
        known = [one.name for one in self.providers(kind)]
        listed = f"Known: {', '.join(known)}." if known else "None is installed."
        message = f"No {title} is called {name!r}. {listed}{nearest(name, known)}"
        suspects = [str(one) for one in self.failures if one.provider is None]
        if not suspects:
            return ConfigError(message)
        return PluginError(f"{message} Failed plugins that might have offered it: {'; '.join(suspects)}.")

    def with_failure(self, loaded: LoadedProvider, stage: str, error: BaseException | str) -> "Plugins":
        """The same plugins with one more failure: that of a provider at a later stage (factory, construct, ...)."""
        words = error if isinstance(error, str) else describe_error(error)
        return replace(self, failures=(*self.failures, failure_of(loaded.source, stage, words, loaded)))

    def engine_started(self, engine: Any) -> None:
        """Tell each plugin that the engine is ready; one that raises is logged, and the others still hear of it."""
        self._tell("octavo_engine_started", engine)

    def engine_stopped(self, engine: Any) -> None:
        """Tell each plugin that the engine has stopped; one that raises is logged."""
        self._tell("octavo_engine_stopped", engine)

    def _tell(self, hook: str, engine: Any) -> None:
        modules = [self.manager.get_plugin(plugin.name) for plugin in self.plugins]
        for plugin, module in zip(self.plugins, modules, strict=True):
            others = [other for other in modules if other is not module]
            try:
                self.manager.subset_hook_caller(hook, others)(engine=engine)
            except Exception as error:
                logger.warning("%s raised in %s: %s", plugin, hook, describe_error(error))


def failure_of(source: LoadedPlugin, stage: str, error: str, provider: LoadedProvider | None = None) -> PluginFailure:
    """A failure of a plugin, or of one of its providers."""
    origin = (source.name, source.distribution, source.version, source.entry_point)
    return PluginFailure(*origin, stage, error, *((provider.kind, provider.name) if provider else ()))
