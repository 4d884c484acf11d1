"""A writer of small GGUF files, and a tiny llama model in one."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

ALIGNMENT = 32
PLAIN_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}

Raw = tuple[int, tuple[int, ...], bytes]
Write = Callable[..., Path]


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _typed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<B", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _text(value)
    kinds = [_typed(item) for item in value]
    return 9, struct.pack("<IQ", kinds[0][0], len(kinds)) + b"".join(data for _, data in kinds)


def _raw(tensor: torch.Tensor | Raw) -> Raw:
    if isinstance(tensor, tuple):
        return tensor
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return PLAIN_TYPES[tensor.dtype], tuple(tensor.shape), data


def _write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor | Raw],
    version: int = 3,
    offsets: Mapping[str, int] | None = None,
) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = _typed(value)
        head += _text(key) + struct.pack("<I", kind) + data
    body = b""
    for name, tensor in tensors.items():
        kind, shape, data = _raw(tensor)
        head += _text(name) + struct.pack(f"<I{len(shape)}QI", len(shape), *shape[::-1], kind)
        head += struct.pack("<Q", (offsets or {}).get(name, len(body)))
        body += data + bytes(-len(data) % ALIGNMENT)
    path.write_bytes(head + bytes(-len(head) % ALIGNMENT) + body)
    return path


@pytest.fixture
def write_gguf() -> Write:
    """Write a GGUF file; a tensor is torch's, or (type number, shape, bytes)."""
    return _write


@pytest.fixture
def tiny_metadata() -> dict[str, Any]:
    """A llama model of two layers, 4 heads on 2 KV heads of size 8, with a tokenizer of single letters."""
    letters = [chr(code) for code in range(97, 123)]
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "</s>", *letters, "ab", "abc"],
        "tokenizer.ggml.token_type": [3, 3, *[1] * 28],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture
def tiny_tensors() -> dict[str, torch.Tensor | Raw]:
    """The tensors that go with tiny_metadata."""
    torch.manual_seed(0)
    shapes = {"token_embd": (30, 32), "output_norm": (32,)}
    for layer in range(2):
        for name, shape in {
            "attn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_norm": (32,),
            "ffn_gate": (64, 32),
            "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
