"""From what the user calls a model to a path."""

import re
from pathlib import Path

from octavo.checkpoints.default_model import Readers, cache_root, ensure_default_model
from octavo.errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
"""What is fetched of a hub repository: no pickle, and no code."""


def resolve_model(
    model: str,
    *,
    readers: Readers,
    download_dir: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Path:
    """The directory or file of `model`: empty for the default model, a path, or a hub id such as "org/name".

    `readers` gives the checkpoint readers; it is called only when the default model must be converted. Raises
    CheckpointError when there is no such model or it cannot be fetched.
    """
    if not model:
        return ensure_default_model(cache_root(download_dir), readers, progress)
    path = Path(model).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"There is no model {model!r}: no such file or directory, and no hub id (organisation/name). "
            "Leave the model out to run the default one."
        )
    return _fetch_from_hub(model, download_dir, revision, progress)


def _fetch_from_hub(model: str, download_dir: str | None, revision: str | None, progress: bool) -> Path:
    import huggingface_hub
    from tqdm import tqdm

    bars = {} if progress else {"tqdm_class": _silent(tqdm)}
    try:
        path = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            cache_dir=str(Path(download_dir).expanduser() / "hub") if download_dir else None,
            allow_patterns=list(HUB_FILES),
            **bars,
        )
    except Exception as error:  # the hub's and the network's errors have no common root
        raise CheckpointError(_not_fetched(model, revision, error)) from error
    return Path(path)


def _silent(bar: type) -> type:
    def start(self: object, *args: object, **kwargs: object) -> None:
        bar.__init__(self, *args, **{**kwargs, "disable": True})  # type: ignore[misc]

    return type("SilentBar", (bar,), {"__init__": start})


def _not_fetched(model: str, revision: str | None, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    at = f" at revision {revision}" if revision else ""
    return (
        f"{model!r} is no file or directory here, and could not be fetched from the Hugging Face hub{at}: {reason}. "
        "Check the name and the network, or give the path of a directory with the model."
    )
