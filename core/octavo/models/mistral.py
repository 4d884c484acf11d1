"""Mistral 7B and its successors."""

from collections.abc import Mapping
from typing import Any

from octavo.models.config import DecoderConfig, num_layers, read_decoder_config
from octavo.models.decoder import Decoder


class MistralForCausalLM(Decoder):
    """Llama with a sliding window in every layer, where the checkpoint has one (Jiang et al. 2023, §2)."""

    architecture = "MistralForCausalLM"

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The model's shape."""
        windows = (config.get("sliding_window"),) * num_layers(config)
        return read_decoder_config(config, windows=windows, attention_bias=False, output_bias=False)
