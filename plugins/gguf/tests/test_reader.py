"""The reader: names, the order of rows, and the configuration."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.config import EngineConfig
from octavo.errors import CheckpointError
from octavo.start import start_engine
from octavo_gguf.reader import GGUFReader

Write = Callable[..., Path]
Metadata = dict[str, Any]
Tensors = dict[str, Any]


@pytest.fixture
def opened(
    tmp_path: Path, write_gguf: Write, tiny_metadata: Metadata, tiny_tensors: Tensors
) -> Callable[..., GGUFReader]:
    """Open the tiny model, with other metadata (None takes a key away) and other tensors."""

    def open_tiny(metadata: Metadata | None = None, tensors: Tensors | None = None) -> GGUFReader:
        keys = {k: v for k, v in (tiny_metadata | (metadata or {})).items() if v is not None}
        weights = {k: v for k, v in (tiny_tensors | (tensors or {})).items() if v is not None}
        return GGUFReader(write_gguf(tmp_path / "m.gguf", keys, weights))

    return open_tiny


Open = Callable[..., GGUFReader]


def _as_llama_cpp_stores(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of a head's rows in a GGUF file: first half and second half in turn."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def test_tensors_have_hugging_face_names_and_shapes(opened: Open) -> None:
    tensors = opened().tensors()
    assert len(tensors) == 2 + 2 * 9
    assert tensors["model.embed_tokens.weight"].shape == (30, 32)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 64)
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)
    assert {info.dtype for info in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(("name", "hf", "heads"), [("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)])
def test_rows_of_q_and_k_are_put_back(opened: Open, name: str, hf: str, heads: int) -> None:
    weight, bias = torch.randn(heads * 8, 32), torch.randn(heads * 8)
    stored = {
        f"blk.1.{name}.weight": _as_llama_cpp_stores(weight, heads),
        f"blk.1.{name}.bias": _as_llama_cpp_stores(bias, heads),
    }
    reader = opened(tensors=stored)
    assert torch.equal(reader.read(f"model.layers.1.self_attn.{hf}.weight"), weight)
    assert torch.equal(reader.read(f"model.layers.1.self_attn.{hf}.bias"), bias)


def test_quantized_rows_are_put_back_too(opened: Open) -> None:
    """Row r of the file holds the value r everywhere, so that the result shows where each row went."""
    block = torch.ones(32, 1, dtype=torch.float16).view(torch.uint8)  # d = 1
    rows = torch.cat([block, torch.arange(32, dtype=torch.uint8).view(32, 1).expand(32, 32)], dim=1)
    reader = opened(tensors={"blk.0.attn_q.weight": (8, (32, 32), rows.numpy().tobytes())})
    wanted = torch.arange(32).view(4, 4, 2).transpose(1, 2).reshape(32).float()
    assert torch.equal(reader.read("model.layers.0.self_attn.q_proj.weight"), wanted[:, None].expand(32, 32))


def test_rows_of_other_tensors_and_of_qwen2_stay(opened: Open, tiny_metadata: Metadata, tiny_tensors: Tensors) -> None:
    values = opened().read("model.layers.0.self_attn.v_proj.weight")
    assert torch.equal(values, tiny_tensors["blk.0.attn_v.weight"])
    renamed = {k.replace("llama.", "qwen2."): v for k, v in tiny_metadata.items()} | {"general.architecture": "qwen2"}
    reader = opened({**dict.fromkeys(tiny_metadata), **renamed}, {"blk.0.attn_q.bias": torch.randn(32)})
    assert torch.equal(reader.read("model.layers.0.self_attn.q_proj.weight"), tiny_tensors["blk.0.attn_q.weight"])
    assert reader.config["architectures"] == ["Qwen2ForCausalLM"]
    assert reader.config["attention_bias"] is True


def test_plain_tensors_keep_their_dtype_and_are_mapped(opened: Open) -> None:
    weight = torch.randn(32, 32)
    reader = opened(tensors={"blk.0.attn_output.weight": weight.half(), "blk.1.attn_output.weight": weight.bfloat16()})
    for layer, dtype in ((0, torch.float16), (1, torch.bfloat16)):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert reader.tensors()[name].dtype == dtype
        assert torch.equal(reader.read(name), weight.to(dtype))
        assert reader.read(name).data_ptr() == reader.read(name).data_ptr()


def test_a_tensor_outlives_its_reader(opened: Open, tiny_tensors: Tensors) -> None:
    reader = opened()
    weight = reader.read("model.norm.weight")
    reader.close()
    del reader
    assert torch.equal(weight, tiny_tensors["output_norm.weight"])


def test_config_says_what_the_file_says(opened: Open) -> None:
    config = opened({"llama.rope.freq_base": 100000.0}).config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5  # not the float64 of its float32
    assert config["rope_theta"] == 100000.0
    wanted = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 30}
    assert {key: config[key] for key in wanted} == wanted
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["tie_word_embeddings"] is True
    assert "rope_scaling" not in config


@pytest.mark.parametrize(
    ("embedding", "dtype"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16"), (torch.float32, "float32")]
)
def test_dtype_is_that_of_a_plain_embedding(opened: Open, embedding: torch.dtype, dtype: str) -> None:
    assert opened(tensors={"token_embd.weight": torch.zeros(30, 32, dtype=embedding)}).config["dtype"] == dtype


def test_dtype_of_a_quantized_model_is_bfloat16(opened: Open) -> None:
    assert opened(tensors={"token_embd.weight": (8, (30, 32), bytes(30 * 34))}).config["dtype"] == "bfloat16"


def test_an_output_layer_unties_the_embeddings(opened: Open) -> None:
    reader = opened(tensors={"output.weight": torch.ones(30, 32)})
    assert reader.config["tie_word_embeddings"] is False
    assert torch.equal(reader.read("lm_head.weight"), torch.ones(30, 32))


def test_generation_config_names_all_ends_of_a_turn(opened: Open) -> None:
    assert opened().generation_config == {"bos_token_id": 0, "eos_token_id": 1}
    more = {"tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.padding_token_id": 3}
    assert opened(more).generation_config == {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 3}


def test_a_window_makes_it_a_mistral(opened: Open) -> None:
    config = opened({"llama.attention.sliding_window": 16}).config
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], 16)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_by_keys(opened: Open, kind: str) -> None:
    keys = {"type": kind, "factor": 4.0, "original_context_length": 32}
    config = opened({f"llama.rope.scaling.{key}": value for key, value in keys.items()}).config
    assert config["rope_scaling"] == {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 32}


def _llama3_divisors(factor: float, theta: float, head_dim: int) -> torch.Tensor:
    """By wavelength, as Llama 3's authors wrote it."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling_of_llama3_is_found_in_its_divisors(opened: Open, factor: float) -> None:
    keys = {"llama.rope.freq_base": 500000.0, "llama.attention.key_length": 64, "llama.attention.value_length": 64}
    weights = {"rope_freqs.weight": _llama3_divisors(factor, 500000.0, 64)}
    config = opened(keys, weights).config
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_divisors_are_refused(opened: Open) -> None:
    with pytest.raises(CheckpointError, match="does not hold Llama-3 rope scaling"):
        opened(tensors={"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 4.0])})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "architecture 'mamba', which is not read; known ones: llama, qwen2"),
        ("general.architecture", ["llama"], "is not read"),
        ("llama.expert_count", 8, "mixture-of-experts"),
        ("llama.block_count", None, "is missing"),
        ("llama.attention.head_count", 0, "is 0, but must be a positive whole number"),
        ("llama.attention.head_count", [4, 4], "must be a positive whole number"),
        ("llama.attention.head_count_kv", 3, "does not divide 4"),
        ("llama.attention.key_length", 7, "must be even"),
        ("llama.rope.dimension_count", 4, "differs from the head size 8"),
        ("llama.rope.freq_base", float("inf"), "must be a positive number"),
        ("llama.rope.scaling.type", "dynamic", "linear and yarn are known"),
        ("tokenizer.ggml.eos_token_id", -1.0, "must be a token id"),
    ],
)
def test_senseless_metadata_is_refused(opened: Open, key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened({key: value})


def test_unknown_tensors_are_refused(opened: Open) -> None:
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ssm_in\.weight', which a dense llama"):
        opened(tensors={"blk.0.ssm_in.weight": torch.ones(4)})
    with pytest.raises(CheckpointError, match=r"no two-dimensional tensor 'token_embd\.weight'"):
        opened(tensors={"token_embd.weight": None})


def test_rows_that_no_heads_divide_are_refused(opened: Open) -> None:
    reader = opened(tensors={"blk.0.attn_q.weight": torch.ones(12, 32)})
    with pytest.raises(CheckpointError, match=r"12 rows of .* cannot be divided among 4 heads"):
        reader.read("model.layers.0.self_attn.q_proj.weight")


def test_a_tensor_that_is_not_there_is_named(opened: Open) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor 'model\.nothing'"):
        opened().read("model.nothing")


def test_a_model_without_a_tensor_is_refused_before_any_is_read(
    opened: Open, tiny_tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding takes seconds a GB: what the last layer lacks is told first."""
    names: list[str] = []
    read = GGUFReader.read
    monkeypatch.setattr(GGUFReader, "read", lambda self, name: names.append(name) or read(self, name))

    def start(reader: GGUFReader) -> None:
        start_engine(EngineConfig(model=str(reader.path), plugins=(), num_threads=1, progress=False))

    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        start(opened(tensors={"blk.1.ffn_down.weight": None}))
    assert names == []
    start(opened())
    assert len(names) == len(tiny_tensors), "the embedding is read once, for the head that is tied to it too"


def test_claims_by_the_first_bytes(tmp_path: Path, opened: Open) -> None:
    assert GGUFReader.claims(opened().path)
    (tmp_path / "x.gguf").write_bytes(b"GGU")
    assert not GGUFReader.claims(tmp_path / "x.gguf")
    assert not GGUFReader.claims(tmp_path)
    assert not GGUFReader.claims(tmp_path / "missing")
