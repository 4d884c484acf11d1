"""Qwen3, dense."""

from collections.abc import Mapping
from typing import Any

from octavo.models.config import DecoderConfig, read_decoder_config
from octavo.models.decoder import Decoder
from octavo.models.qwen2 import layer_windows


class Qwen3ForCausalLM(Decoder):
    """Llama with a norm of each head's queries and keys before rotary."""

    architecture = "Qwen3ForCausalLM"

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The model's shape."""
        head_dim = config.get("head_dim", 128)
        return read_decoder_config(config, windows=layer_windows(config), qk_norm=True, head_dim=head_dim)
