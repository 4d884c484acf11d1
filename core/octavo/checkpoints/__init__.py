"""Checkpoints: from what the user calls a model to its config, tensors and tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

from octavo.checkpoints.default_model import NAME
from octavo.checkpoints.dummy import DummyReader
from octavo.checkpoints.interface import CheckpointReader
from octavo.checkpoints.opening import open_checkpoint
from octavo.checkpoints.resolve import resolve_model
from octavo.config import EngineConfig
from octavo.plugins.loading import load_plugins
from octavo.plugins.registry import Plugins
from octavo.text.tokenizer import Tokenizer

__all__ = ["OpenedModel", "load_tokenizer", "open_model"]


class OpenedModel(NamedTuple):
    """What the user calls the model, where it lies, and its checkpoint."""

    name: str
    path: Path
    reader: CheckpointReader


def open_model(config: EngineConfig, plugins: Plugins) -> OpenedModel:
    """The configured model, opened. Raises CheckpointError."""
    path, name = _resolve(config, plugins), config.model or NAME
    if config.load_format == "dummy":
        return OpenedModel(name, path, DummyReader(path, seed=config.seed))
    return OpenedModel(name, path, open_checkpoint(path, _readers(plugins)))


def load_tokenizer(config: EngineConfig) -> tuple[Path, Tokenizer, dict[str, Any]]:
    """The model's path, tokenizer and generation_config; torch stays unloaded where the model is an HF directory.

    Raises CheckpointError.
    """
    plugins = load_plugins(config.plugins, config.disable_plugin, warn=False)  # the engine warns
    path = _resolve(config, plugins)
    dummy = config.load_format == "dummy"
    reader = DummyReader(path) if dummy else open_checkpoint(path, _readers(plugins))
    try:
        files = Path(config.tokenizer).expanduser() if config.tokenizer else reader.tokenizer_files()
        return path, Tokenizer.from_files(files), dict(reader.generation_config)
    finally:
        reader.close()


def _resolve(config: EngineConfig, plugins: Plugins) -> Path:
    return resolve_model(
        config.model,
        readers=lambda: _readers(plugins),
        download_dir=config.download_dir,
        revision=config.revision,
        progress=config.progress,
    )


def _readers(plugins: Plugins) -> list[type[CheckpointReader]]:
    return [provider.load() for provider in plugins.providers("checkpoint_reader")]  # type: ignore[misc]
