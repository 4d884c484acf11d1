"""The default model itself: its weights, configuration, tokenizer and chat template."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from octavo.checkpoints.opening import open_checkpoint
from octavo.checkpoints.resolve import resolve_model
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.sampling_params import SamplingParams
from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer
from octavo_gguf.reader import GGUFReader

pytestmark = pytest.mark.model

TOKENS = json.loads((Path(__file__).parents[1] / "data" / "gguf" / "smollm2_tokens.json").read_text())
WEIGHTS_SHA256 = "065060049554bbc47de44175d2ec1472165c4602316eb17b0522dc9bee0d9540"
"""Of the tensors that transformers decodes from the same file, in bfloat16."""


@pytest.fixture(scope="module")
def model() -> Path:
    return resolve_model("", readers=lambda: [GGUFReader, SafetensorsReader])


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_files(model)


def test_weights_equal_those_of_transformers_bit_for_bit(model: Path) -> None:
    reader = open_checkpoint(model, [GGUFReader, SafetensorsReader])
    digest = hashlib.sha256()
    for name in sorted(reader.tensors()):
        tensor = reader.read(name)
        assert tensor.dtype == torch.bfloat16
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    assert digest.hexdigest() == WEIGHTS_SHA256


def test_configuration(model: Path) -> None:
    reader = SafetensorsReader(model)
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "dtype": "bfloat16",
    }
    assert {key: reader.config[key] for key in wanted} == wanted
    assert reader.generation_config["eos_token_id"] == 2


@pytest.mark.parametrize("text", TOKENS)
def test_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Stored: what transformers gives, with each digit a token of its own as the model was trained."""
    assert tokenizer.encode(text) == TOKENS[text]
    assert tokenizer.decode(TOKENS[text], skip_special_tokens=False) == text
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=False))
    assert "".join(detokenizer.push([token]) for token in TOKENS[text]) == text


def test_chat(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids[0] == tokenizer.bos_token_id == 1
    assert ids.count(2) == 2
    assert tokenizer.eos_token_id == 2


def test_no_text_is_refused_that_would_fit(tokenizer: Tokenizer) -> None:
    longest = "\n" + " " * 80
    assert tokenizer.max_chars_per_token is not None
    assert len(longest) <= len(tokenizer.encode(longest)) * tokenizer.max_chars_per_token < 2000
