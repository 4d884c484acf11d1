"""The command line: subcommands from plugins, errors in one line, and no torch where none is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from octavo import __version__
from octavo.cli import main

DATA = Path(__file__).parent / "plugins_data"
BROKEN = ["import_raises", "import_exits", "misspelt", "wrong_api", "twin_a", "twin_b", "hook_raises", "not_a_list"]
AFTERWARDS = (
    "import sys; from octavo.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
)


def run(
    *arguments: str, folders: tuple[str, ...] = (), code: str | None = None, **environment: str
) -> tuple[int, str, str]:
    """Run `octavo` in a process of its own, with the distributions of these data folders installed."""
    start = ["-c", code] if code else ["-m", "octavo"]
    roots = [str(DATA / folder) for folder in folders] + [path for path in sys.path if path]
    kept = {name: value for name, value in os.environ.items() if name not in ("OCTAVO_PLUGINS", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "PYTHONPATH": os.pathsep.join(roots), **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "list"], ["plugins", "why", "--help"], ["--version"]])
def test_nothing_loads_torch(arguments: list[str]) -> None:
    code, out, _ = run(*arguments, code=AFTERWARDS)
    assert code == 0
    assert out.splitlines()[-1] == "False"


def test_the_list_works_when_every_third_party_plugin_is_broken() -> None:
    code, out, _ = run("plugins", "list", folders=tuple(BROKEN))
    assert code == 0
    providers, _, failures = out.partition("Failures")
    assert "the reference in torch" in providers
    for name in set(BROKEN) - {"twin_a"}:
        assert f"plugin '{name}'" in failures
    assert "failed at stage 'import': RuntimeError: no driver for this card" in failures


def test_the_list_as_json() -> None:
    code, out, _ = run("plugins", "list", "--json", folders=("good", "wrong_api"))
    assert code == 0
    content = json.loads(out)
    (good,) = [one for one in content["plugins"] if one["name"] == "good"]
    assert (good["distribution"], good["version"], good["builtin"]) == ("octavo_good", "1.2", False)
    assert "good_attention" in [one["name"] for one in content["providers"]["attention"]]
    (failure,) = [one for one in content["failures"] if one["plugin"] == "wrong_api"]
    assert (failure["stage"], failure["kind"], failure["provider"]) == ("api", "attention", "futuristic")


def test_the_list_works_when_nothing_at_all_loads() -> None:
    nothing = (
        "import sys, importlib.metadata as m; from octavo.cli import main;"
        "m.entry_points = lambda **_: [m.EntryPoint('builtin', 'octavo_absent', 'octavo')];"
        "sys.exit(main(sys.argv[1:]))"
    )
    code, out, _ = run("plugins", "list", code=nothing)
    assert code == 0
    assert "No module named 'octavo_absent'" in out


def test_a_third_party_command_runs_and_its_exit_code_counts() -> None:
    assert run("good_command", "World", folders=("good",))[:2] == (5, "Hello World\n")


def test_help_names_the_commands_and_the_broken_plugins() -> None:
    code, out, _ = run("--help", folders=("good", "import_raises"))
    assert code == 0
    assert "good_command" in out
    assert "greet someone" in out
    assert "import_raises" in out.partition("Plugins that failed")[2]


def test_help_survives_a_broken_plugin_that_the_environment_names() -> None:
    code, out, _ = run("--help", folders=("import_raises",), OCTAVO_PLUGINS="import_raises")
    assert code == 0
    assert "no driver for this card" in out


def test_the_environment_keeps_other_plugins_from_loading() -> None:
    code, _, err = run("good_command", "World", folders=("good", "twin_a"), OCTAVO_PLUGINS="twin_a")
    assert code in (1, 2)
    assert "No command is called 'good_command'" in err


def test_a_builtin_command_imports_no_third_party_plugin(tmp_path: Path) -> None:
    code, out, _ = run(
        "plugins", "why", "--help", folders=("import_exits",), code=AFTERWARDS.replace("torch", "octavo_good")
    )
    assert (code, out.splitlines()[-1]) == (0, "False")


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pluginz"]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("octavo: No command is called 'pluginz'.")
    assert "Did you mean 'plugins'?" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--verson"], "--verson is not a known flag. Did you mean '--version'?"),
        (["plugins", "list", "--jason"], "octavo plugins list: --jason is not a known flag. Did you mean '--json'?"),
        (["plugins", "why", "m", "--block-size", "12"], "must be a power of two"),
        (["plugins", "why", "m", "--block_size"], "expected one argument"),
        (["plugins"], "octavo plugins"),
    ],
)
def test_configuration_errors_exit_with_two(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_plugin_error_exits_with_one() -> None:
    code, out, err = run("plugins", "why", "m", "--plugins", "import_raises", folders=("import_raises",))
    assert (code, out) == (1, "")
    assert err.endswith(
        "octavo: The configuration names a plugin that fails: plugin 'import_raises' (broken_import 0.3, "
        "octavo_import_raises) failed at stage 'import': RuntimeError: no driver for this card.\n"
    )


def test_version_and_bare_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"octavo {__version__}\n"
    assert main([]) == 2
    assert "usage: octavo COMMAND" in capsys.readouterr().err


def test_help_of_a_command_returns_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--help"]) == 0
    assert "octavo plugins" in capsys.readouterr().out


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("octavo.plugins_command.load_plugins", interrupt)
    assert main(["plugins", "list"]) == 130
