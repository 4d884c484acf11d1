"""AWQ and GPTQ checkpoints of a tiny Llama, served on the CPU: the tokens are those of their dense weights."""

import json
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from awq_gptq_packers import Quantized, Tensors, awq_gemm, awq_gemv, awq_gemv_fast, gptq, in_order, quantize
from octavo.errors import CheckpointError, UnservedError
from octavo.plugins.loading import load_plugins
from safetensors.torch import load_file, save_file
from tiny_models import Reference, run, start, tokens_of

Pack = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None]
"""Of a module and its weight the stored tensors and the dense weight; None: left as it is."""

AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The core and the two formats, so that no kernel but torch's rounds the product otherwise."""
    info = tmp_path_factory.mktemp("installed") / "octavo-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: octavo\nVersion: 0\n")
    modules = ("octavo.plugins.builtin", "octavo_quant_awq.plugin", "octavo_quant_gptq.plugin")
    lines = [f"{module.split('.')[0]} = {module}\n" for module in modules]
    (info / "entry_points.txt").write_text("".join(["[octavo]\n", *lines]))
    loaded = load_plugins(entry_points=PathDistribution(info).entry_points)
    assert len(loaded.plugins) == 3 and not loaded.failures
    monkeypatch.setattr("octavo.start.load_plugins", lambda *args, **options: loaded)


def pack_awq(version: str, group_size: int = 32, left: tuple[str, ...] = ("lm_head",)) -> Pack:
    def pack(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if any(part in name for part in left):
            return None
        layer = quantize(weight, 4, in_order(weight.shape[1], group_size))
        if version == "gemm":
            return awq_gemm(layer), layer.dense()
        if version == "gemv":
            return awq_gemv(layer, group_size), layer.dense()
        return awq_gemv_fast(layer, group_size), layer.dense_of_minima()

    return pack


def pack_gptq(
    version: int = 1,
    bits: Callable[[str], int] = lambda name: 4,
    group_size: int = 32,
    shuffled: bool = False,
    symmetric: bool = False,
) -> Pack:
    def pack(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if "lm_head" in name or not bits(name):
            return None
        layer = quantize(weight, bits(name), order_of(weight, group_size, shuffled), symmetric)
        return gptq(layer, version), layer.dense()

    return pack


def order_of(weight: torch.Tensor, group_size: int, shuffled: bool) -> list[int]:
    """Groups in order, or shuffled alike for all layers of one input."""
    groups = in_order(weight.shape[1], group_size)
    if not shuffled:
        return groups
    mixed = torch.randperm(len(groups), generator=torch.Generator().manual_seed(len(groups)))
    return [groups[i] for i in mixed]


def mixed_bits(name: str) -> int:
    return 0 if "o_proj" in name else 8 if "down_proj" in name else 3 if "v_proj" in name else 4


DYNAMIC = {"-:.*o_proj": {}, ".*down_proj": {"bits": 8}, "+:.*v_proj": {"bits": 3}}
CHECKPOINTS: dict[str, tuple[Pack, dict[str, Any], str]] = {
    "awq-gemm": (pack_awq("gemm"), AWQ_CONFIG | {"version": "gemm"}, "4-bit integers, groups of 32, zero points"),
    "awq-gemv": (pack_awq("gemv"), AWQ_CONFIG | {"version": "GEMV"}, "4-bit integers, groups of 32, zero points"),
    "awq-gemv_fast": (  # 96 inputs are not whole tiles of 64, so AutoAWQ could not pack these layers
        pack_awq("gemv_fast", left=("lm_head", "down_proj")),
        AWQ_CONFIG | {"version": "gemv_fast"},
        "4-bit integers, groups of 32, minima",
    ),
    "awq-head": (
        pack_awq("gemm", -1, left=("up_proj",)),
        AWQ_CONFIG | {"group_size": -1, "lm_head": True, "modules_to_not_convert": ["up_proj"]},
        "4-bit integers, groups of 64, zero points",
    ),
    "gptq": (pack_gptq(), GPTQ_CONFIG, "4-bit integers, groups of 32, zero points"),
    "gptq-symmetric": (
        pack_gptq(symmetric=True, group_size=-1),
        GPTQ_CONFIG | {"sym": True, "group_size": -1},
        "4-bit integers, groups of 64, symmetric",
    ),
    "gptq-v2-any-order": (
        pack_gptq(version=2, bits=lambda name: 3, shuffled=True),
        GPTQ_CONFIG | {"bits": 3, "desc_act": True, "checkpoint_format": "gptq_v2"},
        "3-bit integers, groups of 32, in any order, zero points",
    ),
    "gptq-ragged": (  # 64 and 96 inputs in groups of 40
        pack_gptq(bits=lambda name: 8, group_size=40),
        GPTQ_CONFIG | {"bits": 8, "group_size": 40},
        "8-bit integers, groups of 40, zero points",
    ),
    "gptq-mixed": (
        pack_gptq(bits=mixed_bits),
        GPTQ_CONFIG | {"dynamic": DYNAMIC},
        "4-bit integers, groups of 32, zero points and 3-bit integers, groups of 32, zero points",
    ),
}


def write(source: Path, directory: Path, pack: Pack, config: dict[str, Any]) -> tuple[Path, Path]:
    """The packed checkpoint, and a dense one of the same weights."""
    packed_dir, dense_dir = (copytree(source, directory / name) for name in ("packed", "dense"))
    packed: Tensors = {}
    dense: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        done = pack(module, tensor) if module.endswith(("_proj", "lm_head")) else None
        dense[name] = tensor if done is None else done[1]
        packed |= {name: tensor} if done is None else {f"{module}.{suffix}": part for suffix, part in done[0].items()}
    save_file(packed, packed_dir / "model.safetensors")
    save_file(dense, dense_dir / "model.safetensors")
    path = packed_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return packed_dir, dense_dir


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_are_those_of_the_dense_weights(llama: Reference, tmp_path: Path, name: str) -> None:
    pack, config, words = CHECKPOINTS[name]
    packed, dense = write(llama.path, tmp_path, pack, config)
    prompts = llama.prompts[4:8]
    engine = start(packed)
    weights = {layer: one["weight"] for one in engine.capacity.details["layers"] for layer in one["layers"]}
    assert weights["model.layers.0.self_attn.v_proj"] == words
    assert weights["lm_head"].startswith("4-bit" if name == "awq-head" else "dense")
    tokens = tokens_of(run(engine, prompts))
    assert tokens == tokens_of(run(start(dense), prompts))
    assert tokens != llama.tokens[4:8]


@pytest.mark.parametrize(("name", "file"), [("awq-gemm", "quant_config.json"), ("gptq", "quantize_config.json")])
def test_a_quantization_that_a_file_beside_config_json_describes(
    llama: Reference, tmp_path: Path, name: str, file: str
) -> None:
    pack, config, words = CHECKPOINTS[name]
    packed, _ = write(llama.path, tmp_path, pack, config)
    own = json.loads((packed / "config.json").read_text())
    own.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(own))
    old = {"bits": "w_bit", "group_size": "q_group_size"} if name.startswith("awq") else {}
    written = {old.get(key, key): value for key, value in config.items() if key != "quant_method"}
    (packed / file).write_text(json.dumps(written))
    assert start(packed).capacity.details["layers"][0]["weight"].startswith(words)


@pytest.mark.parametrize("name", ["awq-gemv", "gptq"])
def test_random_weights_in_the_format(llama: Reference, tmp_path: Path, name: str) -> None:
    """The file describes the format; no tensor of it is read."""
    packed, _ = write(llama.path, tmp_path, *CHECKPOINTS[name][:2])
    (packed / "model.safetensors").unlink()
    layers = start(packed, load_format="dummy").capacity.details["layers"]
    assert layers[0]["weight"] == CHECKPOINTS[name][2]


def test_what_no_kernel_serves_is_refused_where_that_is_asked_for(llama: Reference, tmp_path: Path) -> None:
    packed, _ = write(llama.path, tmp_path, *CHECKPOINTS["gptq"][:2])
    with pytest.raises(UnservedError, match="q_proj would be dequantized, which --strict-backends refuses"):
        start(packed, strict_backends=True)


def test_a_layer_that_does_not_fit_is_named_before_any_is_read(llama: Reference, tmp_path: Path) -> None:
    packed, _ = write(llama.path, tmp_path, CHECKPOINTS["awq-gemm"][0], AWQ_CONFIG | {"group_size": 64})
    with pytest.raises(CheckpointError, match=r"Tensor 'model\.layers\.0\..*\.qzeros' has shape"):
        start(packed)
    packed, _ = write(llama.path, tmp_path / "other", CHECKPOINTS["awq-gemm"][0], AWQ_CONFIG | {"group_size": 48})
    with pytest.raises(CheckpointError, match=r"q_proj has 64 input features, but groups .* a multiple of 48"):
        start(packed)


def test_the_packer_packs_what_it_says() -> None:
    """A layer by hand: two outputs of one group of eight inputs, its zero points 0 and 1."""
    codes = [[1, 2, 3, 4, 5, 6, 7, 8], [15, 0, 0, 0, 0, 0, 0, 0]] + [[0] * 8] * 6
    zeros = [[0], [1]] + [[8]] * 6
    scales, group_of = np.ones((8, 1), dtype=np.float16), np.zeros(8, dtype=int)
    layer = Quantized(4, np.array(codes), np.array(zeros), scales, group_of)
    assert gptq(layer, 2)["qweight"].tolist()[0][:2] == [0x87654321 - (1 << 32), 15]
    assert gptq(layer, 2)["qzeros"].tolist() == [[0x88888810 - (1 << 32)]]
    assert gptq(layer, 1)["qzeros"].tolist() == [[0x777776FF]]
