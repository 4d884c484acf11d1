"""Scales of a KV cache that stores codes: from a checkpoint's tensors, and in files of their own."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octavo.checkpoints.interface import CheckpointReader
from octavo.errors import CheckpointError, ConfigError
from octavo.kv_cache.interface import CodeRange
from octavo.weights.unquantized import quantization_of

_CHECKPOINT_CODES = 448.0
"""The largest code that a checkpoint's scales are for: all of their writers mean float8_e4m3."""
_SPELLINGS = {
    "k": ("k_scale", "k_proj.k_scale", "qkv_proj.k_scale", "k_proj.output_scale", "kv_scale"),
    "v": ("v_scale", "v_proj.v_scale", "qkv_proj.v_scale", "v_proj.output_scale", "kv_scale"),
}
_OTHERWISE = "Say --kv-scales calibrate to find the scales anew, or name a file of scales."


@dataclass(frozen=True, slots=True)
class KVScales:
    """Scales [L, 2, Hk] float32 of every layer's keys and values, and in words where they come from."""

    values: torch.Tensor
    source: str


def checkpoint_scales(reader: CheckpointReader, num_layers: int, num_heads: int, codes: CodeRange) -> KVScales | None:
    """The scales that the checkpoint has, None where it has none; of one value for a layer each head gets it.

    Those for other codes than the format's are stretched to cover the same range of values. Raises CheckpointError
    where they are incomplete or no scales.
    """
    tensors = reader.tensors()
    prefixes = [f"model.layers.{layer}.self_attn" for layer in range(num_layers)]
    names = [
        [next((f"{prefix}.{one}" for one in spellings if f"{prefix}.{one}" in tensors), None) for prefix in prefixes]
        for spellings in _SPELLINGS.values()
    ]
    if not any(name for part in names for name in part):
        return None
    _check_scheme(reader.config)
    for kind, part in zip(_SPELLINGS, names, strict=True):
        if None in part:
            raise CheckpointError(
                f"The checkpoint has KV-cache scales, but {prefixes[part.index(None)]} has none named "
                f"{', '.join(_SPELLINGS[kind])}. {_OTHERWISE}"
            )
    pairs = [[_read(reader, str(name), num_heads) for name in pair] for pair in zip(*names, strict=True)]
    values = torch.stack([torch.stack(pair) for pair in pairs]) * (_CHECKPOINT_CODES / codes.largest)
    return KVScales(values, "checkpoint")


def _check_scheme(config: Mapping[str, Any]) -> None:
    """Refuse scales that config.json gives for other codes than float8_e4m3. Raises CheckpointError."""
    quantization = quantization_of(config)
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, Mapping) else None
    if isinstance(scheme, Mapping) and (scheme.get("type", "float"), scheme.get("num_bits", 8)) != ("float", 8):
        raise CheckpointError(
            f"The checkpoint's KV-cache scales are for codes of {scheme.get('num_bits')} bits, {scheme.get('type')} "
            f"(kv_cache_scheme in config.json), but only those for float8_e4m3 are read. {_OTHERWISE}"
        )


def _read(reader: CheckpointReader, name: str, num_heads: int) -> torch.Tensor:
    """A scale for each head [Hk] float32."""
    tensor = reader.read(name)
    if not tensor.is_floating_point() or tensor.numel() not in (1, num_heads):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"Tensor {name!r} is {dtype} of shape {list(tensor.shape)}, but KV-cache scales are floating-point: "
            f"one for all or one for each of the {num_heads} KV heads. {_OTHERWISE}"
        )
    scales = tensor.reshape(-1).float().expand(num_heads)
    if not _are_scales(scales):
        raise CheckpointError(f"Tensor {name!r} holds {scales.min():g}, but scales are positive numbers. {_OTHERWISE}")
    return scales


def _are_scales(values: torch.Tensor) -> bool:
    return bool((values.isfinite() & (values > 0)).all())


def read_scales(path: Path, layout: str, num_layers: int, num_heads: int) -> torch.Tensor:
    """The scales [L, 2, Hk] in a file that `write_scales` wrote, for this layout. Raises ConfigError."""
    content = _read_json(path)
    if content.get("layout") != layout:
        raise ConfigError(
            f"The KV-cache scales in {path} are for the format {content.get('layout')!r}, but {layout!r} is to be used."
        )
    try:
        parts = [torch.tensor(content[name], dtype=torch.float64) for name in ("keys", "values")]
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(
            f"{path} must hold `keys` and `values`, each a list of numbers for every layer: {error!r}."
        ) from error
    for name, part in zip(("keys", "values"), parts, strict=True):
        if part.shape != (num_layers, num_heads):
            raise ConfigError(
                f"The scales under {name!r} in {path} are of shape {list(part.shape)}, but the model has {num_layers} "
                f"layers of {num_heads} KV heads. Name a file that was made for this model."
            )
        if not _are_scales(part.float()):
            at = tuple((~(part.float().isfinite() & (part.float() > 0))).nonzero()[0].tolist())
            raise ConfigError(
                f"The scale under {name!r} of layer {at[0]}, head {at[1]} in {path} is {part[at]:g}, but must be a "
                "positive number."
            )
    return torch.stack(parts, dim=1).float()


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"The KV-cache scales cannot be read from {path}: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, but must hold a JSON object of KV-cache scales.")
    return content


def write_scales(path: Path, layout: str, values: torch.Tensor) -> None:
    """Keep scales [L, 2, Hk] in a file, which appears in one step. Raises OSError."""
    keys, its_values = values.double().unbind(1)
    content = {"layout": layout, "keys": keys.tolist(), "values": its_values.tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
