"""Throw-away environments below build/interop, each with one library that packs layers and is never imported here."""

import os
import secrets
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SEED = "OCTAVO_INTEROP_SEED"

NEEDS: Mapping[str, tuple[str, ...]] = {
    "autoawq==0.2.9": ("accelerate", "datasets", "zstandard"),
    "auto-gptq==0.7.1": (),
}
"""The libraries, with what they import beyond our own dependencies; all that they ask for would replace our torch."""


def interpreter(requirement: str) -> Path:
    """The interpreter of the library's environment, which the first call makes from the package index.

    torch and our other dependencies come from the environment of the tests by a path line: found there, never changed.
    """
    home = ROOT / "build" / "interop" / requirement
    python, ready = home / "bin" / "python", home / ".ready"
    if not ready.exists():
        _run(sys.executable, "-m", "venv", "--clear", home)
        packages = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
        ours = [path for path in sys.path if path.endswith("-packages")]
        Path(packages, "ours.pth").write_text("\n".join(ours), encoding="utf-8")
        install = (python, "-m", "pip", "install", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
        if NEEDS[requirement]:
            _run(*install, *NEEDS[requirement])
        _run(*install, "--no-deps", requirement)
        ready.touch()
    return python


def pack(requirement: str, script: str, target: Path, rounds: int) -> Iterator[Path]:
    """Pack fresh layers with the library into folders of `target`, and give those; the seed is printed."""
    seed = os.environ.get(SEED) or str(secrets.randbits(31))
    print(f"{script}: {SEED}={seed}")
    _run(interpreter(requirement), HERE / script, target, seed, str(rounds))
    return target.iterdir()


def _run(*command: str | Path) -> None:
    """Run the command with no GPU in sight. What it printed is the error where it fails."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}\n{ran.stdout}{ran.stderr}"
