"""Choose a provider: each candidate ends as the chosen one or with a one-sentence reason."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from traceback import walk_tb
from typing import Any

from octavo.errors import ConfigError, OctavoError, PluginError, UnservedError
from octavo.plugins.kinds import KINDS
from octavo.plugins.options import make_options, split_reference
from octavo.plugins.registry import LoadedProvider, Plugins, describe_error

UNNAMED = "not named by the configuration"
BuildReason = Callable[[LoadedProvider, Any, Any], str | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A provider that was considered: chosen, or not for `reason`."""

    name: str
    plugin: str
    chosen: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen provider with its class and options, and every candidate with its reason."""

    kind: str
    chosen: LoadedProvider
    cls: Any
    options: Any
    candidates: tuple[Candidate, ...]

    def as_dict(self) -> dict[str, Any]:
        """The selection as JSON can hold it."""
        return {
            "kind": self.kind,
            "name": self.chosen.name,
            "plugin": self.chosen.plugin,
            "distribution": self.chosen.distribution,
            "version": self.chosen.version,
            "options": asdict(self.options) if is_dataclass(self.options) else {},  # type: ignore[arg-type]
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    def for_human(self) -> str:
        """A line for the chosen provider, and one for each other candidate with its reason."""
        options = ", ".join(f"{name}={value}" for name, value in self.as_dict()["options"].items())
        lines = [
            f"{KINDS[self.kind].title}: {self.chosen.name}{f' ({options})' if options else ''}"
            f" [{self.chosen.plugin}, {self.chosen.distribution} {self.chosen.version}]"
        ]
        others = (candidate for candidate in self.candidates if not candidate.chosen)
        lines += [f"    not {other.name} [{other.plugin}]: {other.reason}" for other in others]
        return "\n".join(lines)


@dataclass(slots=True)
class _Entry:
    """A candidate on its way: its class and options once they are known, its reason if it cannot serve."""

    loaded: LoadedProvider
    cls: Any = None
    options: Any = None
    reason: str | None = None


def choose(
    plugins: Plugins,
    kind: str,
    spec: Any,
    requested: Sequence[str] = (),
    *,
    strict: bool = False,
    build_reason: BuildReason | None = None,
) -> Selection:
    """Choose a provider of `kind` that can serve `spec`.

    `requested` names candidates in order of preference, with options ("triton:splits=8"); empty: the built-in providers
    by priority. A candidate must pass `build_reason(provider, cls, options)`, support the spec's features, and pass its
    own `why_not`. Raises PluginError when none can serve, when a requested one failed, or under `strict` when a
    requested one cannot serve; ConfigError for an unknown name or option.
    """
    entries = _requested(plugins, kind, requested) if requested else _automatic(plugins, kind)
    for entry in entries:
        entry.reason = entry.reason or _reason(entry, spec, build_reason)
    able = [entry for entry in entries if entry.reason is None]
    reasons = [f"{entry.loaded.name}: {entry.reason}" for entry in entries if entry.reason is not None]
    if requested and strict and reasons:
        raise UnservedError(f"{_asked(kind, requested)} and --strict-backends is set, but {'; '.join(reasons)}.")
    if not able:
        raise UnservedError(_nobody(plugins, kind, requested, reasons))
    winner, by_hook = _decide(plugins, kind, spec, able)
    _explain_losers(able, winner, by_hook, bool(requested))
    return Selection(kind, winner.loaded, winner.cls, winner.options, _candidates(plugins, kind, entries, winner))


def _requested(plugins: Plugins, kind: str, requested: Sequence[str]) -> list[_Entry]:
    """The named candidates; one that is unknown, refused or fails to import is fatal, since it was named."""
    entries = []
    for text in requested:
        name, given = split_reference(text)
        loaded = plugins.get(kind, name)
        entries.append(_Entry(loaded, loaded.load(), make_options(loaded, given)))
    return entries


def _automatic(plugins: Plugins, kind: str) -> list[_Entry]:
    entries = []
    for loaded in plugins.providers(kind):
        if loaded.unasked:
            entry = _Entry(loaded)
            try:
                entry.cls, entry.options = loaded.load(), make_options(loaded, {})
            except (PluginError, ConfigError) as error:
                entry.reason = _sentence(str(error))
            entries.append(entry)
    return entries


def _reason(entry: _Entry, spec: Any, build_reason: BuildReason | None) -> str | None:
    try:
        reason = build_reason(entry.loaded, entry.cls, entry.options) if build_reason else None
        lacking = _lacking(entry.cls, spec)
        if reason is None and lacking:
            return f"it does not support {', '.join(lacking)}"
        why_not = getattr(entry.cls, "why_not", None)
        if reason is None and why_not is not None:
            reason = why_not(spec, entry.options)
    except OctavoError as error:
        return _sentence(str(error))
    except Exception as error:
        return f"the {entry.loaded} failed when asked: {describe_error(error)}"
    return None if reason is None else _sentence(reason)


def _lacking(cls: Any, spec: Any) -> list[str]:
    """Features in use that the class does not declare: the core's own check, so that nobody can skip it."""
    wanted = {name for name, value in (getattr(spec, "features", None) or {}).items() if value}
    return sorted(wanted - set(getattr(cls, "features", ())))


def _sentence(reason: object) -> str:
    return " ".join(str(reason).split()).removesuffix(".")


def _asked(kind: str, requested: Sequence[str]) -> str:
    return f"{KINDS[kind].flag or KINDS[kind].title} names {', '.join(requested)}"


def _nobody(plugins: Plugins, kind: str, requested: Sequence[str], reasons: list[str]) -> str:
    title = KINDS[kind].title
    if requested:
        return f"{_asked(kind, requested)}, but none can serve: {'; '.join(reasons)}."
    if reasons:
        others = [loaded.name for loaded in plugins.providers(kind) if not loaded.unasked]
        hint = f" Others serve only when named: {', '.join(others)}." if others else ""
        return f"No built-in {title} can serve: {'; '.join(reasons)}.{hint}"
    failed = "; ".join(map(str, plugins.failures))
    return f"No built-in {title} is installed{f', and these failed: {failed}' if failed else ''}."


def _decide(plugins: Plugins, kind: str, spec: Any, able: list[_Entry]) -> tuple[_Entry, bool]:
    candidates = tuple(entry.loaded for entry in able)
    caller = plugins.hook.octavo_choose
    try:
        name = caller(kind=kind, spec=spec, candidates=candidates)
    except Exception as error:
        raise PluginError(f"{_culprit(caller, error)} raised in octavo_choose: {describe_error(error)}.") from error
    if name is None:  # no plugin answers, not even the built-in one
        return able[0], False
    for entry in able:
        if entry.loaded.name == name:
            return entry, entry is not able[0]
    asked = ", ".join(implementation.plugin_name for implementation in caller.get_hookimpls())
    names = ", ".join(candidate.name for candidate in candidates)
    raise PluginError(
        f"octavo_choose answered {name!r} for {KINDS[kind].title}, but the candidates are {names}. "
        f"The plugins asked: {asked}."
    )


def _culprit(caller: Any, error: Exception) -> str:
    """The plugin whose function is on the exception's traceback."""
    owners = {getattr(one.function, "__code__", None): one.plugin_name for one in caller.get_hookimpls()}
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code in owners:
            return f"The plugin {owners[frame.f_code]!r}"
    return "A plugin"


def _explain_losers(able: list[_Entry], winner: _Entry, by_hook: bool, requested: bool) -> None:
    name = winner.loaded.name
    for entry in able:
        if entry is not winner:
            if by_hook:
                entry.reason = f"it can serve, but a plugin's octavo_choose preferred {name!r}"
            else:
                order = "is named before it" if requested else "comes before it by priority"
                entry.reason = f"it can serve, but {name!r} {order}"


def _candidates(plugins: Plugins, kind: str, entries: list[_Entry], winner: _Entry) -> tuple[Candidate, ...]:
    considered = [Candidate(one.loaded.name, one.loaded.plugin, one is winner, one.reason) for one in entries]
    seen = {(one.loaded.name, one.loaded.plugin) for one in entries}
    unnamed = [
        Candidate(one.name, one.plugin, False, UNNAMED)
        for one in plugins.providers(kind)
        if (one.name, one.plugin) not in seen
    ]
    refused = [Candidate(one.provider or "", one.plugin, False, one.error) for one in plugins.refused(kind)]
    return (*considered, *unnamed, *refused)
