"""Names of tensors: from GGUF's to Hugging Face's."""

import re

WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

NOT_WEIGHTS = {"rope_freqs.weight"}
"""Tensors that belong to the configuration (octavo_gguf.config reads them)."""

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_INTERLEAVED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


def hf_name(name: str) -> str | None:
    """The Hugging Face name of GGUF tensor `name`, None when it is not one of a llama or qwen2 model."""
    if name in WHOLE_MODEL:
        return WHOLE_MODEL[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in IN_A_LAYER:
        return None
    return f"model.layers.{match[1]}.{IN_A_LAYER[match[2]]}.{match[3]}"


def interleaved_projection(name: str) -> str | None:
    """ "q" or "k" where the rows of GGUF tensor `name` are permuted in files of the llama architecture, else None."""
    match = _INTERLEAVED.fullmatch(name)
    return match[1] if match else None
