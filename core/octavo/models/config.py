"""A decoder's shape, read from config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.errors import CheckpointError

MAX_COUNT = (1 << 31) - 1
MAX_LAYERS = 10_000
_SCALES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Each kind of rope scaling with the numbers that it needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base `theta`, and the scaling's own entries (`rope_type` and what belongs to it)."""

    theta: float
    scaling: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """What the shared decoder needs. `windows` holds each layer's attention window, None for all tokens."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    windows: tuple[int | None, ...]
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    logits_softcap: float = 0.0


def read_decoder_config(config: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    """The config of a Llama-like checkpoint; `differences` are what the architecture does otherwise.

    Raises CheckpointError naming the key that is missing or that asks for what no layer here does.
    """
    heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
    layers = num_layers(config)
    kv_heads = _count(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json has {heads} num_attention_heads, which {kv_heads} num_key_value_heads cannot share evenly."
        )
    values: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": _count(config, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": _count(config, "head_dim", default=hidden // heads),
        "vocab_size": _count(config, "vocab_size"),
        "max_position": _count(config, "max_position_embeddings", default=2048),
        "norm_eps": _number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        "rope": _read_rope(config),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "windows": (None,) * layers,
        "attention_bias": config.get("attention_bias", False),
        "output_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
    }
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json asks for hidden_act {config['hidden_act']!r}, but only silu is built.")
    return DecoderConfig(**(values | differences))


def num_layers(config: Mapping[str, Any]) -> int:
    """The number of layers. Raises CheckpointError."""
    return _count(config, "num_hidden_layers", MAX_LAYERS)


def _count(config: Mapping[str, Any], key: str, most: int = MAX_COUNT, default: int | None = None) -> int:
    """A whole number from 1 to `most`; `default` where the key is missing or null."""
    value = config.get(key)
    if value is None and default is not None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json has no {key!r}, which the model's shape follows from.")
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f"config.json sets {key} to {value!r:.100}, but it must be a number from 1 to {most}.")
    return value


def _number(key: str, value: object) -> float:
    """A positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json sets {key} to {value!r:.100}, but it must be a positive number.")
    return float(value)


def _read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: rope_theta beside rope_scaling, and the later rope_parameters."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json sets rope_parameters to {given!r:.100}, but they must be an object.")
    parameters = dict(given)
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if "type" in parameters:
        parameters.setdefault("rope_type", parameters.pop("type"))
    kind = parameters.setdefault("rope_type", "default")
    if not isinstance(kind, str) or kind not in _SCALES:
        raise CheckpointError(f"config.json asks for rope scaling {kind!r}, but default, linear and llama3 are built.")
    for name in _SCALES[kind]:
        if name not in parameters:
            raise CheckpointError(f"config.json asks for rope scaling {kind!r} without {name!r}.")
        _number(name, parameters[name])
    return RopeConfig(theta=_number("rope_theta", theta), scaling=parameters)


def rope_table(rope: RopeConfig, head_dim: int, length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[length, head_dim]: cosines, then sines, of each position's head_dim / 2 angles (Su et al. 2021, §3.2.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = _scale(1.0 / (rope.theta**exponents), rope.scaling)
    angles = torch.arange(length, dtype=torch.int64).float().outer(frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device=device, dtype=dtype)


def _scale(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    kind = scaling["rope_type"]
    if kind == "linear":
        factor: float = scaling["factor"]
        return frequencies / factor
    if kind == "llama3":
        return _scale_llama3(frequencies, scaling)
    return frequencies


def _scale_llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    long = torch.where(wavelengths > context / low, frequencies / factor, blended)
    return torch.where(wavelengths < context / high, frequencies, long)
