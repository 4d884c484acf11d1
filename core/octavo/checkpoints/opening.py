"""From a path to the reader that claims it."""

from collections.abc import Sequence
from pathlib import Path

from octavo.checkpoints.interface import CheckpointReader
from octavo.errors import CheckpointError


def open_checkpoint(path: Path, readers: Sequence[type[CheckpointReader]]) -> CheckpointReader:
    """Open `path` with the one reader that claims it. Raises CheckpointError when none or several do."""
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    claiming = [reader for reader in readers if reader.claims(path)]
    if not claiming:
        raise CheckpointError(_unclaimed(path, readers))
    if len(claiming) > 1:
        names = ", ".join(reader.__name__ for reader in claiming)
        raise CheckpointError(f"{path} is claimed by several checkpoint readers ({names}): disable all but one.")
    return claiming[0](path)


def _unclaimed(path: Path, readers: Sequence[type[CheckpointReader]]) -> str:
    names = ", ".join(reader.__name__ for reader in readers) or "none"
    hint = "Give a directory with config.json and .safetensors files, or a file of a kind that a plugin reads"
    inside = sorted(child.name for child in path.glob("*.gguf")) if path.is_dir() else []
    if inside:
        hint = f"Name the file inside it, such as {path / inside[0]}"
    return f"{path} is not a checkpoint that any reader knows (readers: {names}). {hint}."
