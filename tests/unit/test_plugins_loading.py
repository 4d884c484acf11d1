"""Loading: each way for a plugin to fail, and that nobody else suffers from it."""

import dataclasses
import logging
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from octavo.errors import ConfigError, PluginError
from octavo.plugins.kinds import KINDS
from octavo.plugins.loading import PluginFailure, Plugins, load_plugins

DATA = Path(__file__).parent / "plugins_data"
BROKEN = {
    "import_raises": ("import", "RuntimeError: no driver for this card"),
    "import_exits": ("import", "SystemExit: go away"),
    "misspelt": ("hook", "'octavo_attention_backend' is not a hook. Did you mean 'octavo_attention_backends'?"),
    "wrong_arguments": ("hook", "clock"),
    "hook_raises": ("call", "octavo_matmuls raised LookupError: no tuned table"),
    "not_a_list": ("call", "octavo_matmuls returned a tuple, not a list of Provider"),
    "returns_none": ("call", "octavo_matmuls returned None, not a list of Provider"),
    "no_hooks": ("register", "it has no hook"),
    "wrong_api": ("api", "is written for api 7, but this core serves api 1"),
}


def builtin() -> list[EntryPoint]:
    return [entry for entry in metadata.distribution("octavo").entry_points if entry.name == "builtin"]


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[EntryPoint]:
    """The built-in plugin's entry point, and those of the distributions in these data folders."""
    folders = [str(DATA / name) for name in names]
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    found = [entry for one in metadata.distributions(path=folders) for entry in one.entry_points]
    return [*found, *builtin()]


def only_failure(plugins: Plugins) -> PluginFailure:
    (failure,) = plugins.failures
    return failure


def test_builtin_providers_load_by_the_same_rules() -> None:
    plugins = load_plugins(entry_points=builtin())
    assert plugins.failures == ()
    assert [one.name for one in plugins.providers("matmul")] == ["torch"]
    assert all(one.builtin for kind in KINDS for one in plugins.providers(kind))
    assert plugins.get("attention", "torch").distribution == "octavo"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "command"])
def test_each_provider_hook_is_asked(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    plugins = load_plugins(entry_points=installed(monkeypatch, "good"))
    loaded = plugins.get(kind, f"good_{kind}")
    assert (loaded.plugin, loaded.distribution, loaded.version) == ("good", "octavo_good", "1.2")
    assert not loaded.builtin
    assert loaded.load().__name__ == "Quick"


def test_builtin_providers_come_first_whatever_the_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = load_plugins(entry_points=installed(monkeypatch, "good"))
    assert [one.name for one in plugins.providers("attention")] == ["torch", "good_attention"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_recorded_and_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    with caplog.at_level(logging.WARNING, "octavo.plugins"):
        plugins = load_plugins(entry_points=installed(monkeypatch, name, "good"))
    stage, words = BROKEN[name]
    failure = only_failure(plugins)
    assert (failure.plugin, failure.stage) == (name, stage)
    assert words in failure.error
    assert failure.entry_point == f"octavo_{name}"
    (record,) = caplog.records
    assert words in record.getMessage()
    assert plugins.get("attention", "good_attention").plugin == "good"
    assert plugins.get("attention", "torch").builtin


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_that_is_named_is_fatal(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    entries = installed(monkeypatch, name, "good")
    with pytest.raises(PluginError) as caught:
        load_plugins([name], entry_points=entries)
    assert BROKEN[name][1] in str(caught.value)
    assert f"names a plugin that fails: plugin {name!r}" in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_disabled_plugin_is_not_even_imported(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plugins = load_plugins(disable=[name], entry_points=installed(monkeypatch, name))
    assert plugins.failures == ()
    assert [plugin.name for plugin in plugins.plugins] == ["builtin"]


def test_a_misspelt_hook_refuses_the_whole_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = load_plugins(entry_points=installed(monkeypatch, "misspelt"))
    assert "MisspeltForCausalLM" not in [one.name for one in plugins.providers("model")]
    with pytest.raises(PluginError, match="is not a hook"):
        plugins.get("model", "MisspeltForCausalLM")


def test_a_wrong_api_refuses_by_name_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = load_plugins(entry_points=installed(monkeypatch, "wrong_api"))
    with pytest.raises(PluginError, match=r"from_the_future 9\.0.*api 7"):
        plugins.get("attention", "futuristic")


def test_the_core_serves_its_api_and_the_one_before() -> None:
    assert KINDS["attention"].accepted == (1,)
    assert KINDS["attention"]._replace(api=3).accepted == (3, 2)


def test_of_two_third_parties_the_first_by_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = installed(monkeypatch, "twin_b", "twin_a")
    for order in (entries, entries[::-1]):
        plugins = load_plugins(entry_points=order)
        failure = only_failure(plugins)
        assert (failure.plugin, failure.stage, failure.provider) == ("twin_b", "duplicate", "twin")
        assert [one.plugin for one in plugins.providers("attention") if one.name == "twin"] == ["twin_a"]


def test_a_name_offered_twice_refuses_until_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = installed(monkeypatch, "twin_a", "twin_b")
    with pytest.raises(PluginError, match=r"twin_a.*not the only one.*twin_b.*--disable-plugin"):
        load_plugins(entry_points=entries).get("attention", "twin")
    assert load_plugins(disable=["twin_a"], entry_points=entries).get("attention", "twin").plugin == "twin_b"
    assert load_plugins(["twin_a"], entry_points=entries).get("attention", "twin").plugin == "twin_a"
    with pytest.raises(PluginError, match="already offers"):
        load_plugins(["twin_a", "twin_b"], entry_points=entries)


def test_a_builtin_name_stays_the_builtin_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = load_plugins(entry_points=installed(monkeypatch, "clash"))
    assert only_failure(plugins).stage == "duplicate"
    assert plugins.get("attention", "torch").plugin == "builtin"


def test_two_plugins_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = installed(monkeypatch, "good", "twin_a")
    clone = EntryPoint("good", "octavo_twin_a", "octavo")
    plugins = load_plugins(entry_points=[*entries, clone])
    failure = only_failure(plugins)
    assert (failure.plugin, failure.stage, failure.distribution) == ("good", "duplicate", "unknown")


def test_one_module_under_two_names_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = installed(monkeypatch, "good")
    plugins = load_plugins(entry_points=[*entries, EntryPoint("later", "octavo_good", "octavo")])
    assert (only_failure(plugins).plugin, only_failure(plugins).stage) == ("later", "register")


def test_only_keeps_the_builtin_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = installed(monkeypatch, "good", "twin_a", "import_raises")
    plugins = load_plugins(["good"], entry_points=entries)
    assert [plugin.name for plugin in plugins.plugins] == ["builtin", "good"]
    assert plugins.failures == ()
    assert [plugin.name for plugin in load_plugins([], entry_points=entries).plugins] == ["builtin"]


def test_unknown_plugin_names_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = installed(monkeypatch, "good")
    with pytest.raises(ConfigError, match=r"'goood'\. Installed: builtin, good\. Did you mean 'good'"):
        load_plugins(["goood"], entry_points=entries)
    with pytest.raises(ConfigError, match="'absent'"):
        load_plugins(disable=["absent"], entry_points=entries)


def test_an_unknown_provider_lists_the_known_and_the_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_plugins(entry_points=builtin())
    with pytest.raises(ConfigError, match=r"No attention backend is called 'torhc'\. Known: torch\. Did you mean"):
        plain.get("attention", "torhc")
    suspect = load_plugins(entry_points=installed(monkeypatch, "import_raises"))
    with pytest.raises(PluginError, match=r"Known: torch\..*might have offered it.*broken_import 0\.3.*no driver"):
        suspect.get("attention", "cuda")


def test_a_kind_that_nobody_offers_says_so() -> None:
    with pytest.raises(ConfigError, match="None is installed"):
        load_plugins(entry_points=builtin()).get("logits_processor", "any")


def test_plugins_are_immutable_and_later_failures_make_a_new_value() -> None:
    plugins = load_plugins(entry_points=builtin())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plugins.failures = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        plugins.by_kind["attention"] = ()  # type: ignore[index]
    later = plugins.with_failure(plugins.get("attention", "torch"), "warmup", ValueError("out of\nmemory"))
    assert plugins.failures == ()
    assert (later.failures[0].stage, later.failures[0].provider) == ("warmup", "torch")
    assert later.failures[0].error == "ValueError: out of memory"


def test_an_engine_hook_that_raises_is_attributed_and_the_others_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugins = load_plugins(entry_points=installed(monkeypatch, "good", "bad_engine_hook"))
    heard: list[str] = []
    with caplog.at_level(logging.WARNING, "octavo.plugins"):
        plugins.engine_started(heard)
        plugins.engine_stopped(heard)
    assert heard == ["started", "stopped"]
    (record,) = caplog.records
    assert "bad_engine_hook" in record.getMessage()
    assert "no dashboard to tell" in record.getMessage()


def test_a_factory_that_cannot_be_imported_names_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = load_plugins(entry_points=installed(monkeypatch, "bad_engine_hook"))
    with pytest.raises(PluginError, match=r"'absent' of plugin 'bad_engine_hook' \(bad_engine_hook 1\.0"):
        plugins.get("attention", "absent").load()


def test_damaged_metadata_of_one_distribution_spares_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: damaged\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_bytes(b"[octavo]\nx = \xff\xfe\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins(only=())
    assert plugins.get("attention", "torch").builtin
    assert "UnicodeDecodeError" in next(one.error for one in plugins.failures if "damaged" in one.plugin)


def test_two_loads_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = installed(monkeypatch, "good")
    first, second = load_plugins(entry_points=entries), load_plugins([], entry_points=entries)
    assert first.manager is not second.manager
    assert second.manager.get_plugin("good") is None
