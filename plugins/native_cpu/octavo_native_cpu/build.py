"""Compiles the C source once for this machine and loads it: the system's compiler, the user's cache directory."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "csrc"
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),  # what vectorising needs; results keep their bits
)
TIMEOUT = 120  # seconds that a compiler may take
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Built:
    """The loaded library, or in one sentence why there is none."""

    library: ctypes.CDLL | None
    reason: str | None


class BuildError(Exception):
    """Why the library cannot be had, in one sentence."""


@cache
def built() -> Built:
    """The library with torch's threads handed over, compiled unless the cache has it; computed once in a process."""
    try:
        library = load(cache_directory())
    except BuildError as error:
        return Built(None, str(error))
    _use_torch_threads(library)
    return Built(library, None)


def cache_directory() -> Path:
    """Where compiled libraries are kept: below the user's cache directory, as the default model is."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "octavo" / "native_cpu"


def load(directory: Path) -> ctypes.CDLL:
    """The library in `directory`, compiled and put there if need be. Raises BuildError.

    A directory that cannot be written, or that others could write, is not used: the library is then compiled into a
    temporary one, for this process alone.
    """
    compiler = find_compiler()
    name = f"{_digest(compiler)}.so"
    if _make_private(directory):
        try:
            return _load_cached(compiler, directory / name)
        except (OSError, BuildError):  # no room, or a file system from which no code may be loaded
            pass
    return _load_temporary(compiler, name)


def _load_temporary(compiler: list[str], name: str) -> ctypes.CDLL:
    try:
        with tempfile.TemporaryDirectory(prefix="octavo-native-") as temporary:
            return _load_cached(compiler, Path(temporary) / name)  # loaded, it needs its file no more
    except OSError as error:
        raise BuildError(f"the compiled kernels cannot be kept in a file and loaded: {error}") from error


def _load_cached(compiler: list[str], path: Path) -> ctypes.CDLL:
    if not path.is_file():
        compile_to(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # damaged: one more try
        compile_to(compiler, path)
        return ctypes.CDLL(str(path))


def compile_to(compiler: list[str], path: Path) -> None:
    """Compile under a temporary name, which becomes `path` in one step. Raises BuildError, OSError."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".work-") as work:
        target = Path(work) / path.name
        _run([*compiler, *FLAGS, "-o", str(target), str(SOURCE / "kernels.c"), "-lm"])
        target.replace(path)


def find_compiler() -> list[str]:
    """The command of the C compiler: $CC, else cc, gcc or clang. Raises BuildError."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    asked = f"CC names {named[0]}, which is not on PATH" if named else "there is no cc, gcc or clang on PATH"
    raise BuildError(f"the kernels are compiled at first use, but {asked}")


def _digest(compiler: list[str]) -> str:
    """Names a build by all that it depends on: source, flags, compiler and processor."""
    parts = [path.read_bytes() for path in sorted(SOURCE.iterdir())]
    version = _run([*compiler, "--version"])
    parts += [text.encode() for text in (*compiler, *FLAGS, version, platform.machine(), _processor())]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def _processor() -> str:
    """The model and the instruction sets of the first processor, or what the platform module knows of it."""
    try:
        first = _CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return platform.processor()
    wanted = ("model", "flags", "features", "cpu part", "cpu implementer")
    return "\n".join(line for line in first.splitlines() if line.lower().startswith(wanted))


def _run(command: list[str]) -> str:
    """What a compiler prints. Raises BuildError with its last words when it fails."""
    try:
        ran = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C compiler {command[0]} cannot be run: {error}") from error
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if "error" in line] or ran.stderr.splitlines() or ["nothing"]
        raise BuildError(f"the C compiler {command[0]} fails (status {ran.returncode}) and says: {said[0].strip()}")
    return ran.stdout


def _make_private(directory: Path) -> bool:
    """Whether the directory is there, made if need be, and ours alone to write: code is loaded from it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return False
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return private and os.access(directory, os.W_OK | os.X_OK)


def _use_torch_threads(library: ctypes.CDLL) -> None:
    """Hand over the OpenMP entry that torch itself calls; where it has none, everything stays in one thread."""
    import torch

    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # looked up in all that torch is linked with
    except (OSError, AttributeError):
        return
    library.use_threads(ctypes.cast(parallel, ctypes.c_void_p))
