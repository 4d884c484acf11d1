"""Where a KV cache's scales come from: the checkpoint, a file, a calibration, kept or yet to be made, or the wish."""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from octavo.checkpoints.default_model import cache_root
from octavo.checkpoints.interface import CheckpointReader
from octavo.config import EngineConfig
from octavo.errors import CheckpointError, ConfigError
from octavo.kv_cache.interface import CodeRange
from octavo.kv_cache.scales import KVScales, checkpoint_scales, read_scales, write_scales
from octavo.runtime.assembly import Assembly, Limits
from octavo.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TEXT = files("octavo.kv_cache") / "calibration.txt"
_BETWEEN_PROMPTS = "\n---\n"
_RANDOM_PROMPTS, _RANDOM_TOKENS = 4, 256
_LONGEST_PROMPT = 512  # tokens
_IDENTITY = ("*.safetensors", "*.json")  # files of a model's directory that say whether it is still the same


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scales that are not known yet: `prompts` are to be run once the model is loaded, `path` keeps the result.

    Those of random weights are not kept (None).
    """

    prompts: list[list[int]]
    path: Path | None
    layout: str
    codes: CodeRange

    def finish(self, largest: torch.Tensor) -> KVScales:
        """The scales for the largest magnitudes [L, 2, Hk] of the prompts' keys and values. Raises CheckpointError."""
        if not largest.isfinite().all():
            layer = int((~largest.isfinite()).nonzero()[0, 0])
            raise CheckpointError(
                f"The KV cache cannot be calibrated: keys or values of layer {layer} are not finite on an ordinary "
                "text. Check the checkpoint, try --dtype float32, or name a file of scales with --kv-scales."
            )
        values = self.codes.scales(largest)
        if self.path is None:
            return KVScales(values, "calibrated now, for weights that are random")
        try:
            write_scales(self.path, self.layout, values)
        except OSError as error:
            logger.warning("The KV cache's scales could not be kept in %s: %s.", self.path, error)
            return KVScales(values, f"calibrated now, and not kept: {error}")
        return KVScales(values, f"calibrated now, kept in {self.path}")


def find_scales(assembly: Assembly, reader: CheckpointReader, path: Path) -> KVScales | Calibration | None:
    """The cache's scales, or what finds them; None where the format has none. `path` is the model's.

    Raises ConfigError for a bad file or a wish that the format cannot fulfil, CheckpointError for bad tensors.
    """
    config, model, cache_format = assembly.config, assembly.model, assembly.cache_format
    codes: CodeRange | None = getattr(cache_format, "codes", None)
    shape, wish = (model.num_layers, model.num_kv_heads), config.kv_scales
    if codes is None:
        if wish != "auto":
            raise ConfigError(
                f"kv_scales (--kv-scales) is {wish!r}, but the KV-cache format {cache_format.layout!r} has no scales. "
                "Name one that has with --kv-cache-dtype, or leave --kv-scales out."
            )
        return None
    if wish == "unit":
        return KVScales(torch.ones(shape[0], 2, shape[1]), "unit")
    if wish not in ("auto", "calibrate"):
        file = Path(wish).expanduser()
        return KVScales(read_scales(file, cache_format.layout, *shape), f"file {file}")
    found = checkpoint_scales(reader, *shape, codes) if wish == "auto" else None
    kept = _kept_path(assembly, path, codes)
    if found is None and wish == "auto" and kept and os.path.exists(kept):  # Path.exists raises where it may not look
        try:
            return KVScales(read_scales(kept, cache_format.layout, *shape), f"calibrated before, from {kept}")
        except ConfigError as error:
            logger.warning("The KV cache is calibrated again. %s", error)
    return found or Calibration(_prompts(assembly, reader), kept, cache_format.layout, codes)


def _kept_path(assembly: Assembly, path: Path, codes: CodeRange) -> Path | None:
    """The file for a model's scales: its name changes with the model's files, the format and how weights are made."""
    config, path = assembly.config, path.resolve()
    if config.load_format == "dummy":
        return None
    parts = [path] if path.is_file() else sorted(one for pattern in _IDENTITY for one in path.glob(pattern))
    stats = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    made = (config.load_format, config.quantization, config.tokenizer, str(assembly.dtype))
    text = (TEXT.read_text(encoding="utf-8"), _longest_prompt(assembly.limits))
    identity = (str(path), stats, assembly.cache_format.layout, codes, made, text)
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return cache_root(config.download_dir) / "kv_scales" / f"{path.name}-{digest}.json"


def _longest_prompt(limits: Limits) -> int:
    return min(limits.max_model_len, _LONGEST_PROMPT)


def _prompts(assembly: Assembly, reader: CheckpointReader) -> list[list[int]]:
    """The shipped text's parts in the model's tokens, or random tokens where it has none; none is too long."""
    longest, vocab_size = _longest_prompt(assembly.limits), assembly.model.vocab_size
    texts = ([token for token in one if token < vocab_size] for one in _text_prompts(assembly.config, reader))
    prompts = [one for one in texts if one] or _random_prompts(vocab_size)
    return [prompt[at : at + longest] for prompt in prompts for at in range(0, len(prompt), longest)]


def _text_prompts(config: EngineConfig, reader: CheckpointReader) -> Sequence[list[int]]:
    try:
        found = Path(config.tokenizer).expanduser() if config.tokenizer else reader.tokenizer_files()
        tokenizer = Tokenizer.from_files(found)
    except CheckpointError as error:
        if config.tokenizer:
            raise
        logger.warning("The KV cache is calibrated with random tokens, for want of a tokenizer. %s", error)
        return []
    return [tokenizer.encode(part) for part in TEXT.read_text(encoding="utf-8").split(_BETWEEN_PROMPTS)]


def _random_prompts(vocab_size: int) -> Sequence[list[int]]:
    generator = torch.Generator().manual_seed(0)
    tokens: list[list[int]] = torch.randint(vocab_size, (_RANDOM_PROMPTS, _RANDOM_TOKENS), generator=generator).tolist()
    return tokens
