"""Selection: who is chosen, and the reason of everyone who is not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from octavo.errors import ConfigError, PluginError
from octavo.plugins.loading import LoadedProvider, Plugins, load_plugins
from octavo.plugins.records import Provider
from octavo.plugins.registry import LoadedPlugin, failure_of
from octavo.plugins.selection import UNNAMED, Selection, choose

DATA = Path(__file__).parent / "plugins_data"


@dataclass(frozen=True)
class Spec:
    """What is asked for."""

    features: Mapping[str, Any] = field(default_factory=dict)
    wish: str | None = None
    explode: bool = False


class Plain:
    """Serves any spec without features."""


class Windowed:
    """Supports windows."""

    features = frozenset({"window"})


class Never:
    """Serves nothing."""

    @staticmethod
    def why_not(spec: Spec, options: Any) -> str | None:
        """Always a reason."""
        return "it needs a GPU."


def builtin_source() -> LoadedPlugin:
    return LoadedPlugin("core", "octavo", "0", "octavo.core", builtin=True)


def house(**classes: tuple[int, Any]) -> Plugins:
    """Built-in attention backends: name=(priority, factory)."""
    source = builtin_source()
    providers = [
        LoadedProvider.of("attention", Provider(name=name, factory=factory, summary=name, priority=priority), source)
        for name, (priority, factory) in classes.items()
    ]
    return Plugins.of([source], [], providers, load_plugins(entry_points=[]).manager)


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> Plugins:
    """The plugins of these data folders, beside two built-in ones."""
    folders = [str(DATA / name) for name in names]
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    found: list[EntryPoint] = [one for dist in metadata.distributions(path=folders) for one in dist.entry_points]
    third = load_plugins(entry_points=found)
    local = house(simple=(0, Plain), windowed=(5, Windowed))
    providers = [*local.providers("attention"), *third.providers("attention")]
    return Plugins.of([*local.plugins, *third.plugins], third.failures, providers, third.manager)


def reasons(selection: Selection) -> dict[str, str | None]:
    return {candidate.name: candidate.reason for candidate in selection.candidates if not candidate.chosen}


def test_the_builtin_of_highest_priority_is_chosen() -> None:
    selection = choose(house(low=(0, Plain), high=(9, Plain)), "attention", Spec())
    assert (selection.chosen.name, selection.cls) == ("high", Plain)
    assert reasons(selection) == {"low": "it can serve, but 'high' comes before it by priority"}


def test_one_that_lacks_a_feature_is_rejected_by_the_core() -> None:
    plugins = house(new=(0, Windowed), old=(9, Plain))
    selection = choose(plugins, "attention", Spec({"window": 128, "softcap": 0.0}))
    assert selection.chosen.name == "new"
    assert reasons(selection) == {"old": "it does not support window"}
    with pytest.raises(PluginError, match=r"old: it does not support sinks, window; new: it does not support sinks"):
        choose(plugins, "attention", Spec({"window": 128, "sinks": True}))


def test_why_not_and_build_reason_narrow_further() -> None:
    plugins = house(plain=(0, Plain), never=(9, Never))
    assert reasons(choose(plugins, "attention", Spec())) == {"never": "it needs a GPU"}

    def refuse(loaded: LoadedProvider, cls: Any, options: Any) -> str | None:
        return f"{cls.__name__} of {loaded.name} gets {options}"

    with pytest.raises(PluginError, match=r"never: Never of never gets None; plain: Plain of plain gets None"):
        choose(plugins, "attention", Spec(), build_reason=refuse)


def test_a_third_party_serves_only_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "good")
    automatic = choose(plugins, "attention", Spec())
    assert automatic.chosen.name == "windowed"
    assert reasons(automatic)["good_attention"] == UNNAMED
    named = choose(plugins, "attention", Spec(), ["good_attention:splits=8"])
    assert (named.chosen.plugin, named.options.splits) == ("good", 8)
    assert reasons(named) == {"windowed": UNNAMED, "simple": UNNAMED}


def test_a_list_is_tried_in_order_and_strict_refuses_the_first_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "good")
    requested = ["good_attention:splits=65", "simple", "windowed"]
    selection = choose(plugins, "attention", Spec(), requested)
    assert selection.chosen.name == "simple"
    assert reasons(selection) == {
        "good_attention": "65 splits are more than 64",
        "windowed": "it can serve, but 'simple' is named before it",
    }
    with pytest.raises(PluginError, match=r"--strict-backends is set, but good_attention: 65 splits"):
        choose(plugins, "attention", Spec(), requested, strict=True)
    assert choose(plugins, "attention", Spec(), ["simple"], strict=True).chosen.name == "simple"


def test_a_named_one_that_fails_is_fatal_even_when_another_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "bad_engine_hook", "wrong_api", "import_raises")
    for name, words in (
        ("absent", "cannot be imported.*AttributeError"),
        ("futuristic", "api 7"),
        ("cuda", "no driver for this card"),
    ):
        with pytest.raises(PluginError, match=words):
            choose(plugins, "attention", Spec(), [name, "simple"])


def test_an_unknown_name_or_option_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "good")
    with pytest.raises(ConfigError, match="Did you mean 'simple'"):
        choose(plugins, "attention", Spec(), ["simpel"])
    with pytest.raises(ConfigError, match="no option 'speed'"):
        choose(plugins, "attention", Spec(), ["good_attention:speed=9"])


def test_why_not_that_raises_is_an_attributed_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "bad_engine_hook")
    selection = choose(plugins, "attention", Spec(), ["moody", "simple"])
    assert selection.chosen.name == "simple"
    reason = reasons(selection)["moody"]
    assert reason is not None
    assert "plugin 'bad_engine_hook' (bad_engine_hook 1.0" in reason
    assert "ZeroDivisionError: split by zero heads" in reason


def test_a_builtin_that_cannot_be_imported_is_passed_over() -> None:
    selection = choose(house(plain=(0, Plain), gone=(9, "octavo_absent.module:Gone")), "attention", Spec())
    assert selection.chosen.name == "plain"
    assert "No module named 'octavo_absent'" in str(reasons(selection)["gone"])


def test_octavo_choose_decides_among_those_that_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "good")
    selection = choose(plugins, "attention", Spec(wish="simple"))
    assert selection.chosen.name == "simple"
    assert reasons(selection)["windowed"] == "it can serve, but a plugin's octavo_choose preferred 'simple'"
    with pytest.raises(PluginError, match=r"answered 'good_attention'.*candidates are windowed, simple.*asked: good"):
        choose(plugins, "attention", Spec(wish="good_attention"))


def test_octavo_choose_that_raises_is_attributed(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "good", "bad_engine_hook")
    with pytest.raises(PluginError, match="'bad_engine_hook' raised in octavo_choose: ArithmeticError"):
        choose(plugins, "attention", Spec(explode=True))


def test_refused_providers_are_shown_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = installed(monkeypatch, "wrong_api", "twin_a", "twin_b")
    shown = [(one.name, one.plugin) for one in choose(plugins, "attention", Spec()).candidates]
    assert {("futuristic", "wrong_api"), ("twin", "twin_a"), ("twin", "twin_b")} <= set(shown)


def test_nobody_at_all_says_what_failed() -> None:
    failure = failure_of(builtin_source(), "import", "ModuleNotFoundError: gone")
    empty = Plugins.of([], [failure], [], load_plugins(entry_points=[]).manager)
    with pytest.raises(PluginError, match=r"No built-in attention backend is installed.*ModuleNotFoundError: gone"):
        choose(empty, "attention", Spec())


def test_a_selection_is_readable_by_machines_and_people(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = choose(installed(monkeypatch, "good"), "attention", Spec(), ["good_attention:splits=8"])
    content = json.loads(json.dumps(selection.as_dict()))
    assert (content["kind"], content["name"], content["version"]) == ("attention", "good_attention", "1.2")
    assert content["options"]["splits"] == 8
    assert content["candidates"][1] == {"name": "windowed", "plugin": "core", "chosen": False, "reason": UNNAMED}
    first, *rest = selection.for_human().splitlines()
    assert first.startswith("attention backend: good_attention (splits=8, ")
    assert f"    not simple [core]: {UNNAMED}" in rest


def test_a_provider_that_is_not_automatic_serves_only_when_named() -> None:
    source = builtin_source()
    shy = Provider(name="shy", factory=Plain, summary="shy", priority=9, automatic=False)
    usual = Provider(name="usual", factory=Never, summary="usual")
    loaded = [LoadedProvider.of("attention", one, source) for one in (shy, usual)]
    plugins = Plugins.of([source], [], loaded, load_plugins(entry_points=[]).manager)
    with pytest.raises(PluginError, match=r"usual: it needs a GPU\. Others serve only when named: shy\."):
        choose(plugins, "attention", Spec())
    assert choose(plugins, "attention", Spec(), ("shy",)).chosen.name == "shy"
    plugins = Plugins.of([source], [], [loaded[0], replace(loaded[1], factory=Plain)], plugins.manager)
    selection = choose(plugins, "attention", Spec())
    assert selection.chosen.name == "usual"
    assert [one.reason for one in selection.candidates if one.name == "shy"] == [UNNAMED]
