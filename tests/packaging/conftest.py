"""The wheel that is tested, built once and installed once into an environment of its own."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str | Path, cwd: Path) -> None:
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from the working tree without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel in it; the dependencies are those of this one.

    They come by a path line: Python reads no .pth file of a folder found that way, so the working tree stays out.
    """
    home = tmp_path_factory.mktemp("clean") / "env"
    _run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    _run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=home.parent)
    packages = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    Path(packages, "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")
    return python
