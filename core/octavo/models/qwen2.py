"""Qwen2 and Qwen2.5."""

from collections.abc import Mapping
from typing import Any

from octavo.models.config import DecoderConfig, num_layers, read_decoder_config
from octavo.models.decoder import Decoder


def layer_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Windows by `layer_types`, or of the layers from `max_window_layers` on where `use_sliding_window` is set."""
    layers = num_layers(config)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = config.get("max_window_layers", layers)
    return tuple(window if i >= first else None for i in range(layers))


class Qwen2ForCausalLM(Decoder):
    """Llama with a bias in q, k and v, and a window in some layers."""

    architecture = "Qwen2ForCausalLM"

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The model's shape."""
        return read_decoder_config(config, windows=layer_windows(config), attention_bias=True, output_bias=False)
