"""The built wheel: what it holds, and that it works where there is no working tree."""

import json
import os
import subprocess
import tomllib
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _package_folders() -> list[Path]:
    return [ROOT / folder for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]


def _metadata(wheel: Path, name: str) -> str:
    with ZipFile(wheel) as archive:
        (path,) = (item for item in archive.namelist() if item.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def _run(clean_python: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(clean_python.parent / arguments[0]), *arguments[1:]]
    ran = subprocess.run(command, cwd=clean_python.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_package_folder_is_in_the_wheel() -> None:
    marked = {path.parent for path in ROOT.glob("*/*/py.typed")} | {
        path.parent for path in ROOT.glob("plugins/*/*/py.typed")
    }
    assert marked == set(_package_folders())


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(folder.parent).as_posix()
        for folder in _package_folders()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == sources


def test_wheel_names_its_commands_and_plugins(wheel: Path) -> None:
    entry_points = ConfigParser(delimiters=("=",))
    entry_points.read_string(_metadata(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == PROJECT["project"]["scripts"]
    assert dict(entry_points["octavo"]) == PROJECT["project"]["entry-points"]["octavo"]


def test_wheel_carries_licence_and_version(wheel: Path) -> None:
    fields = Parser().parsestr(_metadata(wheel, "METADATA"))
    assert fields["Version"] == PROJECT["project"]["version"]
    assert fields["Requires-Python"] == ">=3.11"
    assert fields["License-Expression"] == "Apache-2.0"
    assert "Apache License" in _metadata(wheel, "licenses/LICENSE")


def test_wheel_is_what_the_clean_environment_imports(clean_python: Path) -> None:
    found = _run(
        clean_python, "python", "-c", "import octavo, octavo_gguf; print(octavo.__path__, octavo_gguf.__path__)"
    )
    assert found.count(str(clean_python.parents[1])) == 2
    assert str(ROOT) not in found


def test_octavo_tells_its_version(clean_python: Path) -> None:
    assert PROJECT["project"]["version"] in _run(clean_python, "octavo", "--version")
    assert PROJECT["project"]["version"] in _run(clean_python, "python", "-m", "octavo", "--version")


def test_every_plugin_of_the_wheel_loads(clean_python: Path) -> None:
    listed = json.loads(_run(clean_python, "octavo", "plugins", "list", "--json"))
    assert listed["failures"] == []
    assert {plugin["name"] for plugin in listed["plugins"]} == set(PROJECT["project"]["entry-points"]["octavo"])
    assert {plugin["version"] for plugin in listed["plugins"]} == {PROJECT["project"]["version"]}


def test_plugins_are_listed_for_a_reader(clean_python: Path) -> None:
    lines = _run(clean_python, "octavo", "plugins", "list").splitlines()
    for name, module in PROJECT["project"]["entry-points"]["octavo"].items():
        assert any(line.split()[:1] == [name] and module in line for line in lines)


@pytest.mark.parametrize("command", ["serve", "bench"])
def test_server_and_workbench_add_their_commands(clean_python: Path, command: str) -> None:
    assert f"octavo {command}" in _run(clean_python, "octavo", command, "--help")
