"""A decoder's shape, read from config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from octavo.errors import CheckpointError


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
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        layers = config["num_hidden_layers"]
        values: dict[str, Any] = {
            "num_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": config["intermediate_size"],
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or hidden // heads,
            "vocab_size": config["vocab_size"],
            "max_position": config.get("max_position_embeddings", 2048),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope": _read_rope(config),
            "tie_embeddings": config.get("tie_word_embeddings", False),
            "windows": (None,) * layers,
            "attention_bias": config.get("attention_bias", False),
            "output_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
        }
    except KeyError as error:
        raise CheckpointError(f"config.json has no {error}, which the model's shape follows from.") from None
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json asks for hidden_act {config['hidden_act']!r}, but only silu is built.")
    return DecoderConfig(**(values | differences))


def _read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: rope_theta beside rope_scaling, and the later rope_parameters."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if "type" in parameters:
        parameters.setdefault("rope_type", parameters.pop("type"))
    kind = parameters.setdefault("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"config.json asks for rope scaling {kind!r}, but default, linear and llama3 are built.")
    return RopeConfig(theta=float(theta), scaling=parameters)


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
