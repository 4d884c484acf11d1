"""What make says where the machine lacks something, and that a prepared environment is used as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what the set-up rule reads."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


OURS = ("MAKE", "MFLAGS", "ARGS", "PYTHON", "TORCH_INDEX")  # what the make that runs these tests hands down


def _make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return subprocess.run(["make", *arguments], cwd=clone, env=environment, capture_output=True, text=True, timeout=120)


def _refusal(clone: Path, python: str | Path) -> str:
    made = _make(clone, "serve", f"PYTHON={python}")
    assert made.returncode != 0
    sentence, _ = made.stderr.splitlines()  # the other line is make's own
    return sentence


def test_no_python(clone: Path) -> None:
    assert "There is no missing-python" in _refusal(clone, "missing-python")


def test_old_python(clone: Path) -> None:
    old = _script(clone / "old", 'test "$1" = --version && echo Python 3.9.2')
    assert _refusal(clone, old).startswith("Python 3.9.2 is too old: Octavo needs 3.11")


def test_no_venv_module(clone: Path) -> None:
    bare = _script(clone / "bare", 'case "$*" in *ensurepip*) echo Traceback >&2; exit 1;; esac')
    assert "install its venv module" in _refusal(clone, bare)


def test_no_pip(clone: Path) -> None:
    _script(clone / ".venv/bin/python", 'case "$*" in *pip*) echo No module named pip >&2; exit 1;; esac')
    assert "delete .venv and run make again" in _refusal(clone, sys.executable)


def test_set_up_runs_once_and_under_the_constraints(clone: Path) -> None:
    _script(clone / ".venv/bin/python", f'echo "$@" >> "{clone}/calls"')
    _script(clone / ".venv/bin/octavo", 'echo octavo "$@"')
    first = _make(clone, "serve", "ARGS=--port 9000", f"PYTHON={sys.executable}", "TORCH_INDEX=https://torch.example")
    assert first.stdout.splitlines()[-1] == "octavo serve --port 9000"
    installs = [line for line in (clone / "calls").read_text(encoding="utf-8").splitlines() if "install" in line]
    assert installs == [
        "-m pip install --no-deps -c constraints.txt --index-url https://torch.example torch",
        "-m pip install -c constraints.txt -e .[dev]",
    ]
    assert _make(clone, "bench", f"PYTHON={sys.executable}").stdout == "octavo bench cpu\n"
    assert installs == (clone / "calls").read_text(encoding="utf-8").splitlines()[-2:]
