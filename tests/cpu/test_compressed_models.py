"""Quantized checkpoints of the tiny Llama: tokens of the dense model of the same values, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from compressed_models import CASES, Pair, fp8, int8, write_pair
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.distributed.solo import Solo
from octavo.engine.loop import Engine
from octavo.errors import CheckpointError, ConfigError, OctavoError, PluginError
from octavo.models.builder import ModelBuilder, NoPlace
from octavo.plugins.loading import load_plugins
from octavo.weights.interface import Matmul, Weight
from octavo.weights.loader import WeightLoader
from octavo.weights.torch_matmul import TorchMatmul
from safetensors.torch import load_file, save_file
from tiny_models import GREEDY, Reference, run, start, tokens_of

PARAMS = replace(GREEDY, max_tokens=32)
LAYER = "model.layers.1.self_attn"


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pair]:
    """Each way of storing the model, with its dense twin."""
    return request.param, write_pair(tmp_path_factory.mktemp(request.param), CASES[request.param])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint stored in the way that is named."""
    paths: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in paths:
            paths[name] = write_pair(tmp_path_factory.mktemp(name), CASES[name]).quantized
        return paths[name]

    return write


def tokens(path: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return tokens_of(run(start(path, **options), prompts, PARAMS))


def layers_of(engine: Engine) -> dict[str, str]:
    """Each layer's weight as the checkpoint has it."""
    return {name: layer["weight"] for layer in engine.capacity.details["layers"] for name in layer["layers"]}


def test_greedy_tokens_are_those_of_the_dense_model(pair: tuple[str, Pair], llama: Reference) -> None:
    name, paths = pair
    prompts = llama.prompts[::3]
    found = tokens(paths.quantized, prompts)
    assert found == tokens(paths.dense, prompts)
    if "w3" in name or "w4" in name:
        assert found != [one[:32] for one in llama.tokens[::3]], "so coarse a model says the same as the original"


def test_every_linear_layer_is_quantized(pair: tuple[str, Pair]) -> None:
    _, paths = pair
    found = layers_of(start(paths.quantized))
    assert found.pop("lm_head") == "dense float32"
    assert len(found) == 14
    assert not [name for name, weight in found.items() if weight.startswith("dense")]


class Unplaced(NoPlace):
    """Every weight as it is, with the reference."""

    def place(
        self, names: Any, weight: Weight, stored_bytes: int, origin: str, fallback: str | None
    ) -> tuple[Matmul, Any]:
        matmul = TorchMatmul()
        return matmul, matmul.pack(weight)


@pytest.mark.parametrize(
    ("name", "num_parts"),
    [
        ("fp8-tensor", 1),
        ("fp8-block", 3),  # q has 64 rows, which blocks of 48 cut
        ("ct-fp8-block", 1),
        ("fbgemm-rows", 1),
        ("ct-int8-tensor", 1),
        ("ct-w4-asym", 1),
        ("ct-w3-asym", 1),
        ("ct-w8-ordered", 1),
    ],
)
def test_fused_layers_join_where_that_is_exact(written: Callable[[str], Path], name: str, num_parts: int) -> None:
    path = written(name)
    reader = SafetensorsReader(path)
    (provider,) = [one for one in load_plugins().providers("weights") if one.load().claim(reader.config) is not None]
    weight_format = provider.load().claim(reader.config)
    nothing: Any = None
    loader = WeightLoader(reader, torch.float32, torch.device("cpu"))
    build = ModelBuilder(loader, weight_format, nothing, Solo(), Unplaced(), nothing)
    linear = build.column([(f"{LAYER}.{one}_proj", size) for one, size in (("q", 64), ("k", 32), ("v", 32))], 64, False)
    assert len(linear.parts) == num_parts
    dense = load_file(path.parent / "dense" / "model.safetensors")
    wanted = torch.cat([dense[f"{LAYER}.{one}_proj.weight"] for one in "qkv"])
    found = linear(torch.eye(64)).t()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("name", "write"), [("fp8", fp8(1, 0, "")), ("int8", int8(1))])
def test_a_dense_checkpoint_quantized_while_it_is_loaded(
    name: str, write: Any, llama: Reference, tmp_path: Path
) -> None:
    path = copytree(llama.path, tmp_path / "dense")
    weights = load_file(path / "model.safetensors")
    rounded = {key: write(tensor)[1] if key.endswith("_proj.weight") else tensor for key, tensor in weights.items()}
    save_file(rounded, path / "model.safetensors")
    engine = start(llama.path, quantization=name)
    prompts = llama.prompts[::3]
    assert tokens_of(run(engine, prompts, PARAMS)) == tokens(path, prompts)
    found = layers_of(engine)
    assert found.pop("lm_head") == "dense float32"
    assert {weight.split(",")[0] for weight in found.values()} == {{"fp8": "float8_e4m3fn"}.get(name, name)}


def refusal(kind: type[OctavoError], path: Path, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        start(path, **options)
    return str(caught.value)


def test_an_unknown_quantization(llama: Reference) -> None:
    message = refusal(ConfigError, llama.path, quantization="int3")
    assert message.startswith("No weight format is called 'int3'. Known: ")
    for known in ("compressed-tensors", "fbgemm_fp8", "fp8", "int8", "unquantized"):
        assert known in message


@pytest.mark.parametrize(("stored", "asked"), [("fp8-tensor", "int8"), ("ct-w4-sym", "fp8"), ("fbgemm-rows", "fp8")])
def test_a_quantization_that_contradicts_the_checkpoint(
    written: Callable[[str], Path], stored: str, asked: str
) -> None:
    method = CASES[stored].config["quant_method"]
    assert refusal(PluginError, written(stored), quantization=asked) == (
        f"--quantization names {asked}, but none can serve: {asked}: the checkpoint is of another format: its "
        f"quant_method is {method!r}."
    )


@pytest.mark.parametrize("asked", ["fbgemm_fp8", "compressed-tensors"])
def test_a_format_that_quantizes_nothing(llama: Reference, asked: str) -> None:
    assert "not quantized" in refusal(PluginError, llama.path, quantization=asked)


def edited(path: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Path:
    """A copy with other tensors, or another quantization in config.json."""
    copytree(path, target)
    tensors, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("stored", "change", "found"),
    [
        (
            "fp8-block",
            lambda t, c: t.pop(f"{LAYER}.o_proj.weight_scale_inv"),
            f"no tensor '{LAYER}.o_proj.weight_scale_inv'",
        ),
        (
            "fp8-block",
            lambda t, c: t.update({f"{LAYER}.o_proj.weight_scale_inv": torch.ones(1, 2)}),
            f"'{LAYER}.o_proj.weight_scale_inv' has shape [1, 2], but config.json asks for [2, 2]",
        ),
        (
            "fp8-tensor",
            lambda t, c: c.update(activation_scheme="static"),
            "no tensor 'model.layers.0.self_attn.q_proj.input",
        ),
        ("fp8-tensor", lambda t, c: c.update(fmt="e5m2"), "is float8_e4m3fn, but its format stores float8_e5m2"),
        (
            "ct-w4-asym",
            lambda t, c: t.pop(f"{LAYER}.v_proj.weight_zero_point"),
            f"no tensor '{LAYER}.v_proj.weight_zero_",
        ),
        ("ct-w4-sym", lambda t, c: c["config_groups"]["group_0"]["weights"].update(group_size=48), "groups of 48"),
        ("ct-w4-sym", lambda t, c: c["config_groups"]["group_0"]["weights"].update(num_bits=8), "asks for [64, 16]"),
        ("ct-w3-asym", lambda t, c: c.pop("version"), "config.json asks for [64, 7]"),
        ("ct-int8-rows", lambda t, c: c.update(ignore=[f"{LAYER}.q_proj"]), f"{LAYER}.q_proj is stored quantized"),
        ("ct-int8-rows", lambda t, c: c.update(format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
    ],
)
def test_broken_checkpoints_are_told_from_their_headers(
    written: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    change: Any,
    found: str,
) -> None:
    path = edited(written(stored), tmp_path / "model", change)
    monkeypatch.setattr(SafetensorsReader, "read", lambda self, name: pytest.fail(f"{name} was read"))
    message = refusal(CheckpointError, path)
    assert found in message
    assert "can serve" not in message, "what other formats say is beside the point"


def test_a_layer_stored_dense_is_dense_whatever_config_json_says(
    written: Callable[[str], Path], tmp_path: Path, llama: Reference
) -> None:
    original = load_file(llama.path / "model.safetensors")
    name = f"{LAYER}.o_proj"

    def make_dense(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors.pop(f"{name}.weight_scale_inv")
        tensors[f"{name}.weight"] = original[f"{name}.weight"]

    found = layers_of(start(edited(written("fp8-block"), tmp_path / "model", make_dense)))
    assert found[name] == "dense float32"
    assert found[f"{LAYER}.q_proj"].startswith("float8")


def test_logits_stored_in_fp8_are_read_so(written: Callable[[str], Path], tmp_path: Path) -> None:
    """The format leaves them dense of its own accord; the header knows better."""

    def quantize(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        stored, _ = fp8(0, 0, "weight_scale")(tensors.pop("lm_head.weight"))
        tensors.update({f"lm_head.{suffix}": tensor for suffix, tensor in stored.items()})

    path = edited(written("fp8-tensor"), tmp_path / "model", quantize)
    assert layers_of(start(path))["lm_head"] == "float8_e4m3fn, a scale for each tensor"


@pytest.mark.parametrize("stored", ["fp8-block", "fp8-tensor", "ct-w4-asym", "ct-w8-ordered", "ct-int8-rows"])
def test_dummy_weights(written: Callable[[str], Path], stored: str) -> None:
    engine = start(written(stored), load_format="dummy")
    assert layers_of(engine).pop("lm_head") == "dense float32"
    assert len(run(engine, [[1, 2, 3]], replace(GREEDY, max_tokens=4))[0].token_ids) == 4
