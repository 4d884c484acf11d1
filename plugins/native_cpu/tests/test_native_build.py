"""The compile: once, into a private directory, by one process at a time or two; or one sentence why not."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from octavo.plugins.loading import load_plugins
from octavo.plugins.selection import choose
from octavo.testing.attention import make_spec
from octavo_native_cpu import build, plugin
from octavo_native_cpu.build import BuildError

pytestmark = pytest.mark.skipif(build.built().library is None, reason=f"{build.built().reason}")

LOAD = """
import sys
from pathlib import Path
from octavo_native_cpu import build
build.FLAGS = tuple(flag for flag in build.FLAGS if flag != "-O3")  # the test would take seconds
build.load(Path(sys.argv[1]))
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source of one function, so that a compile takes no time; the directory to build into."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "kernels.c").write_text("int answer(void) { return 42; }\n", encoding="utf-8")
    monkeypatch.setattr(build, "SOURCE", source)
    return tmp_path / "cache" / "native_cpu"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """`built` as a new process would compute it."""
    monkeypatch.setattr(build, "built", build.built.__wrapped__)


def answer(library: ctypes.CDLL) -> int:
    return int(library.answer())


def test_compiled_once_into_a_private_directory(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(build.load(quick)) == 42
    assert stat.S_IMODE(quick.stat().st_mode) == 0o700
    (made,) = quick.iterdir()
    monkeypatch.setattr(build, "compile_to", lambda compiler, path: pytest.fail("compiled again"))
    assert answer(build.load(quick)) == 42
    assert list(quick.iterdir()) == [made]


def test_another_source_or_flag_is_another_build(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load(quick)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    build.load(quick)
    (build.SOURCE / "kernels.c").write_text("int answer(void) { return 43; }\n", encoding="utf-8")
    assert answer(build.load(quick)) == 43
    assert len(list(quick.iterdir())) == 3


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both compile the real kernels, both load, one file is left."""
    directory = tmp_path / "native_cpu"
    command = [sys.executable, "-c", LOAD, str(directory)]
    processes = [subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    assert [path.suffix for path in directory.iterdir()] == [".so"]


def test_a_damaged_file_is_compiled_again(quick: Path) -> None:
    name = f"{build._digest(build.find_compiler())}.so"
    quick.mkdir(parents=True, mode=0o700)
    (quick / name).write_bytes(b"no library")
    assert answer(build.load(quick)) == 42


def test_a_directory_that_cannot_be_made(quick: Path) -> None:
    quick.parent.write_text("a file, where the directory should be", encoding="utf-8")
    assert answer(build.load(quick)) == 42
    assert quick.parent.is_file()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_nothing_is_loaded_from_where_others_write(quick: Path, mode: int) -> None:
    quick.mkdir(parents=True)
    quick.chmod(mode)
    assert answer(build.load(quick)) == 42
    assert list(quick.iterdir()) == []


def test_nothing_is_loaded_through_a_link(quick: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    quick.parent.mkdir()
    quick.symlink_to(tmp_path / "elsewhere")
    assert answer(build.load(quick)) == 42
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_no_compiler(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert build.built() == build.Built(
        None, "the kernels are compiled at first use, but there is no cc, gcc or clang on PATH"
    )


def test_a_compiler_that_is_not_there(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "nobodys-cc -m64")
    with pytest.raises(BuildError, match="CC names nobodys-cc, which is not on PATH"):
        build.load(quick)


def test_a_compiler_that_fails(quick: Path) -> None:
    (build.SOURCE / "kernels.c").write_text("int answer(void) { return nothing; }\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"fails \(status 1\) and says: .*error: .*nothing.* undeclared"):
        build.load(quick)
    assert list(quick.iterdir()) == []


def test_torch_serves_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named before torch, native gives its reason and torch is chosen."""
    reason = "the kernels are compiled at first use, but there is no cc, gcc or clang on PATH"
    monkeypatch.setattr("octavo_native_cpu.ops.built", lambda: build.Built(None, reason))
    plugins = load_plugins()
    (provider,) = plugin.octavo_attention_backends()
    assert provider.priority > plugins.get("attention", "torch").priority
    if any(one.name == "native" for one in plugins.providers("attention")):
        selection = choose(plugins, "attention", make_spec(dtype=torch.bfloat16), ("native", "torch"))
        assert [(one.name, one.reason) for one in selection.candidates][:2] == [("native", reason), ("torch", None)]


def test_the_hook_module_imports_nothing_heavy() -> None:
    check = "import sys, octavo_native_cpu.plugin; assert not {'torch', 'octavo_native_cpu.build'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
