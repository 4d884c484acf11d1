"""Llama 2, 3, 3.1, 3.2 and what shares its architecture (SmolLM2, TinyLlama, ...)."""

from octavo.models.decoder import Decoder


class LlamaForCausalLM(Decoder):
    """The decoder as it is (Touvron et al. 2023; Llama-3 rope scaling)."""

    architecture = "LlamaForCausalLM"
