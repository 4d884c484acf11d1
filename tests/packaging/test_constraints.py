"""constraints.txt pins what pyproject.toml asks for."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# pip belongs to the environment; torch itself names the triton that it needs; octavo[test] is this project.
NOT_PINNED = {"pip", "octavo"}


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in requirements}


def test_torch_is_pinned() -> None:
    assert _pins()["torch"] == Version("2.13.0")


def test_each_name_is_pinned_once() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    names = [line.split("==")[0] for line in lines if "==" in line]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)])
def test_pins_satisfy_the_project(text: str) -> None:
    requirement = Requirement(text)
    name = canonicalize_name(requirement.name)
    if name not in NOT_PINNED:
        assert _pins()[name] in requirement.specifier
