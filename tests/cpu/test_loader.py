"""From a directory to a running engine: what is refused and how, and what is read from older configurations."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.config import EngineConfig
from octavo.errors import CheckpointError, ConfigError, OctavoError
from octavo.start import start_engine
from octavo.weights.canonical import Dense
from octavo.weights.interface import LinearShape
from octavo.weights.loader import WeightLoader
from octavo.weights.unquantized import Unquantized
from safetensors.torch import load_file, save_file
from tiny_models import GREEDY, Reference, run, start, tokens_of
from tiny_tokenizer import write_tokenizer

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def directory(llama: Reference, tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return copytree(llama.path, tmp_path / "model")


def edit_config(directory: Path, **changes: Any) -> None:
    """Set entries of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refusal(kind: type[OctavoError], directory: Path, **options: Any) -> str:
    """The message with which the engine does not start."""
    with pytest.raises(kind) as caught:
        start(directory, **options)
    return str(caught.value)


def test_missing_tensor(directory: Path) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.pop(name))
    assert refusal(CheckpointError, directory) == f"The checkpoint has no tensor {name!r}, which the model needs."


def test_missing_bias(directory: Path) -> None:
    edit_config(directory, attention_bias=True)
    assert "model.layers.0.self_attn.q_proj.bias" in refusal(CheckpointError, directory)


def test_wrong_shape(directory: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:, :95].contiguous()}))
    message = f"Tensor {name!r} has shape [64, 95], but config.json asks for [64, 96]."
    assert refusal(CheckpointError, directory) == message


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_wrong_shape_outside_the_layers(directory: Path, name: str) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    assert f"Tensor {name!r} has shape" in refusal(CheckpointError, directory)


@pytest.mark.parametrize(("names", "found"), [(["MambaForCausalLM"], "MambaForCausalLM"), (None, "not named")])
def test_unknown_architecture(directory: Path, names: list[str] | None, found: str) -> None:
    edit_config(directory, architectures=names)
    message = refusal(CheckpointError, directory)
    assert found in message
    for offered in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert offered in message


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method is 'hqq'"),
    ],
)
def test_config_that_nothing_here_serves(directory: Path, changes: dict[str, Any], found: str) -> None:
    edit_config(directory, **changes)
    assert found in refusal(OctavoError, directory)


def test_length_beyond_the_models(llama: Reference) -> None:
    message = refusal(ConfigError, llama.path, max_model_len=257)
    assert "max_model_len" in message
    assert "257" in message
    assert "256" in message


def test_a_cache_larger_than_the_memory(directory: Path) -> None:
    message = refusal(ConfigError, directory, num_gpu_blocks_override=1 << 44)
    assert f"A KV cache of {(1 << 44) + 1} blocks takes" in message and "num_gpu_blocks_override" in message


@pytest.mark.parametrize("options", [{"num_gpu_blocks_override": 11}, {"kv_cache_memory_bytes": 99_000}])
def test_cache_that_holds_no_request(llama: Reference, options: dict[str, int]) -> None:
    """A block is 2 layers of 2 x 2 heads x 16 tokens x 16 x 4 bytes: 8 KiB. The null block takes one."""
    message = refusal(ConfigError, llama.path, **options)
    assert "room for 11 blocks of 16 tokens" in message
    assert "max_model_len (192) needs 12" in message
    assert "at most 176" in message
    assert start(llama.path, **options, max_model_len=176).capacity.max_model_len == 176


def test_unknown_dtype(llama: Reference) -> None:
    message = refusal(ConfigError, llama.path, dtype="int3")
    assert "int3" in message
    assert "bfloat16" in message


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float32", "auto", "bfloat16"),
        ("bfloat16", "auto", "bfloat16"),
        ("float16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float32", "half", "float16"),
    ],
)
def test_dtype(directory: Path, stored: str, asked: str, expected: str) -> None:
    edit_config(directory, dtype=stored)
    engine, info = start_engine(EngineConfig(model=str(directory), dtype=asked, plugins=(), progress=False))
    assert info.dtype == expected
    assert len(run(engine, [[1, 2, 3]], replace(GREEDY, max_tokens=8))[0].token_ids) == 8


def test_dummy_weights_follow_the_seed(llama: Reference) -> None:
    first, same, other = (
        tokens_of(run(start(llama.path, load_format="dummy", seed=seed), llama.prompts[:4])) for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other
    assert first != llama.tokens[:4]


@pytest.mark.parametrize("tiny", ["llama-rope-scaled-tied", "llama-biased", "qwen2-two-groups"], indirect=True)
def test_older_spelling_of_the_config(tiny: Reference, tmp_path: Path) -> None:
    """rope_theta beside rope_scaling, torch_dtype, and no layer_types: as checkpoints were written before."""
    directory = copytree(tiny.path, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    rope = config["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = {"type": kind, **rope} if kind != "default" else None
    older = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32", "head_dim": None}
    edit_config(directory, **older, dtype=None, rope_parameters=None, layer_types=None)
    assert tokens_of(run(start(directory), tiny.prompts)) == tiny.tokens


def test_sharded_checkpoint(llama: Reference, directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, directory / file)
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert tokens_of(run(start(directory), llama.prompts[:4])) == llama.tokens[:4]


@pytest.mark.parametrize(("split", "axis"), [("output", 0), ("input", 1)])
def test_ranks_load_their_parts(llama: Reference, split: str, axis: int) -> None:
    reader = SafetensorsReader(llama.path)
    shape = LinearShape("model.layers.0.mlp.gate_proj", 64, 96, False)
    whole = load_file(llama.path / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"]

    def part(rank: int, size: int) -> torch.Tensor:
        loader = WeightLoader(reader, torch.float32, torch.device("cpu"), rank, size)
        weight = loader.load(Unquantized(), shape, split).weight
        assert isinstance(weight, Dense)
        return weight.weight

    assert torch.equal(part(0, 1), whole)
    assert torch.equal(torch.cat([part(rank, 4) for rank in range(4)], dim=axis), whole)
    assert part(1, 4).shape[axis] * 4 == whole.shape[axis]
    with pytest.raises(CheckpointError, match=r"gate_proj.weight' has \d+ elements along axis \d, which 5 ranks"):
        part(0, 5)


def test_no_model_class_of_transformers_is_loaded(llama: Reference, directory: Path) -> None:
    """The offline engine, tokenizer included, generates without transformers' modelling code."""
    write_tokenizer(directory)
    code = f"""
import sys
from octavo import LLM, SamplingParams
llm = LLM({str(directory)!r}, dtype="float32", num_threads=1, max_model_len=192, progress=False, plugins=())
params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
(answer,) = llm.generate([{llama.prompts[5]}], params, use_tqdm=False)
llm.shutdown()
modelling = [name for name in sys.modules if name.startswith("transformers") and "modeling" in name]
print([list(answer.outputs[0].token_ids), modelling])
"""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.replace("'", '"')) == [llama.tokens[5], []]
