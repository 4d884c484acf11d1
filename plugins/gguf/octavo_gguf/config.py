"""The metadata of a GGUF file as the contents of config.json and generation_config.json."""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from octavo.errors import CheckpointError

from octavo_gguf.file import GGUFFile

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
DTYPES = {"F16": "float16", "F32": "float32"}
END_OF_TURN_KEYS = ("eos", "eot", "eom")
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192
"""The published constants of Llama-3 rope scaling: every such model has them."""


class Metadata:
    """Typed, checked access to metadata. `prefix` is the architecture, which most keys begin with."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values = values
        self.path = path
        prefix = values.get("general.architecture")
        if not isinstance(prefix, str) or prefix not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                f"{path} holds a model of the architecture {prefix!r}, which is not read; known ones: {known}."
            )
        self.prefix = prefix

    def fail(self, key: str, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: the metadata key {key!r} {problem}. Convert the model anew.")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number under "<architecture>.<key>"."""
        value = self.values.get(f"{self.prefix}.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(f"{self.prefix}.{key}", f"is {_short(value)}, but must be a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number under "<architecture>.<key>", as the shortest decimal of its float32."""
        value = self.values.get(f"{self.prefix}.{key}", default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            self.fail(f"{self.prefix}.{key}", f"is {_short(value)}, but must be a positive number")
        return _shortest(float(value))

    def optional(self, key: str) -> Any:
        """Whatever is under "<architecture>.<key>", None where nothing is."""
        return self.values.get(f"{self.prefix}.{key}")

    def token_id(self, kind: str) -> int | None:
        """The id of a special token ("bos", "eos", "padding", ...), None where the file names none."""
        key = f"tokenizer.ggml.{kind}_token_id"
        value = self.values.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value < 1 << 31):
            self.fail(key, f"is {_short(value)}, but must be a token id")
        return value


def _short(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]


def _shortest(value: float) -> float:
    """9.999999747378752e-06 is how a float32 of 1e-5 reads in float64: give the number that was meant."""
    short = float(f"{value:.7g}")
    as_float32 = struct.pack("<f", value) if abs(value) < 3e38 else b""
    return short if as_float32 and struct.pack("<f", short) == as_float32 else value


def make_config(file: GGUFFile, rope_factors: Sequence[float] | None) -> dict[str, Any]:
    """The contents of config.json. `rope_factors` is the tensor rope_freqs.weight, where there is one.

    Raises CheckpointError for an unknown architecture and for missing or senseless keys.
    """
    metadata = Metadata(file.metadata, file.path)
    if metadata.optional("expert_count"):
        raise CheckpointError(f"{file.path} holds a mixture-of-experts model; only dense ones are read.")
    heads = metadata.count("attention.head_count")
    hidden = metadata.count("embedding_length")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[metadata.prefix]],
        "model_type": metadata.prefix,
        "dtype": _dtype(file),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": metadata.count("attention.key_length", hidden // heads),
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
    }
    _check_heads(config, metadata)
    scaling = _rope_scaling(metadata, config, rope_factors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if metadata.optional("attention.sliding_window"):
        _add_window(config, metadata)
    return config


def make_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The contents of generation_config.json: the tokens that begin, end and pad a text."""
    metadata = Metadata(file.metadata, file.path)
    ids = [metadata.token_id(kind) for kind in END_OF_TURN_KEYS]
    ends = list(dict.fromkeys(token for token in ids if token is not None))
    found = {
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": metadata.token_id("padding"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _dtype(file: GGUFFile) -> str:
    """The dtype to compute in: the file's own where the embedding is plain, else bfloat16."""
    embedding = file.tensors.get("token_embd.weight")
    return DTYPES.get(embedding.type.name, "bfloat16") if embedding else "bfloat16"


def _vocab_size(file: GGUFFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(
            f"{file.path} has no two-dimensional tensor 'token_embd.weight': it is not a whole model."
        )
    return embedding.shape[0]


def _check_heads(config: Mapping[str, Any], metadata: Metadata) -> None:
    heads, kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % kv_heads:
        metadata.fail(f"{metadata.prefix}.attention.head_count_kv", f"is {kv_heads}, which does not divide {heads}")
    if head_dim % 2:
        metadata.fail(f"{metadata.prefix}.attention.key_length", f"is {head_dim}, but must be even")
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.count(key, head_dim) != head_dim:
            metadata.fail(f"{metadata.prefix}.{key}", f"differs from the head size {head_dim}, which is not supported")


def _add_window(config: dict[str, Any], metadata: Metadata) -> None:
    config["sliding_window"] = metadata.count("attention.sliding_window")
    if metadata.prefix == "llama":  # the architecture that Mistral files are written under
        config.update(architectures=["MistralForCausalLM"], model_type="mistral")
    else:
        config["use_sliding_window"] = True


def _rope_scaling(
    metadata: Metadata, config: Mapping[str, Any], factors: Sequence[float] | None
) -> dict[str, Any] | None:
    """The `rope_scaling` entry of config.json, None where rotary positions are not scaled."""
    if factors is not None:
        return _llama3_scaling(metadata, config, factors)
    kind = metadata.optional("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        metadata.fail(f"{metadata.prefix}.rope.scaling.type", f"is {_short(kind)}; linear and yarn are known")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    if metadata.optional("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = metadata.count("rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(metadata: Metadata, config: Mapping[str, Any], factors: Sequence[float]) -> dict[str, Any]:
    """Llama-3 scaling, which a GGUF file states as one divisor per rotary frequency.

    The largest divisor is the factor, and the other three constants are the published ones; that the divisors follow
    from them is checked.
    """
    factor = max(factors)
    expected = _llama3_divisors(config["rope_theta"], config["head_dim"], factor)
    close = len(factors) == len(expected) and all(
        math.isclose(found, wanted, rel_tol=1e-3) for found, wanted in zip(factors, expected, strict=True)
    )
    if not close:
        raise CheckpointError(
            f"{metadata.path}: the tensor 'rope_freqs.weight' does not hold Llama-3 rope scaling, the only kind of "
            "scaling by frequency that is read."
        )
    return {
        "rope_type": "llama3",
        "factor": _shortest(factor),
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _llama3_divisors(theta: float, head_dim: int, factor: float) -> list[float]:
    """1 for short wavelengths, `factor` for long ones, and in between a blend linear in the frequency."""
    divisors = []
    for i in range(0, head_dim, 2):
        turns = LLAMA3_CONTEXT / (2 * math.pi * theta ** (i / head_dim))  # over the original context
        blend = min(max((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW), 0.0), 1.0)
        divisors.append(1 / ((1 - blend) / factor + blend))
    return divisors
