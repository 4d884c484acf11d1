"""Each rank's part of a quantized layer: the same values as that part of the whole, or a sentence that says why not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import CASES, write_pair
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.errors import CheckpointError
from octavo.plugins.loading import load_plugins
from octavo.weights.interface import LinearShape
from octavo.weights.loader import HeaderCheck, WeightLoader
from safetensors.torch import load_file

LAYER = "model.layers.0"
QUERY = LinearShape(f"{LAYER}.self_attn.q_proj", 64, 64, False)
KEY = LinearShape(f"{LAYER}.self_attn.k_proj", 64, 32, False)
OUTPUT = LinearShape(f"{LAYER}.self_attn.o_proj", 64, 64, False)
DOWN = LinearShape(f"{LAYER}.mlp.down_proj", 96, 64, False)

SHARED = [
    *((name, shape, split) for name in ("fp8-tensor", "ct-fp8-tensor", "ct-int8-tensor", "fbgemm-rows", "ct-int8-rows")
      for shape, split in ((QUERY, "output"), (KEY, "output"), (OUTPUT, "input"), (DOWN, "input"))),
    *(("ct-w8-ordered", shape, split) for shape, split in ((QUERY, "output"), (OUTPUT, "input"), (DOWN, "input"))),
    *((name, shape, split) for name in ("ct-w4-sym", "ct-w4-asym") for shape, split in
      ((QUERY, "output"), (KEY, "output"), (OUTPUT, "input"))),
    ("ct-w3-asym", QUERY, "output"),
    ("ct-w3-asym", OUTPUT, "input"),
    ("ct-fp8-block", QUERY, "output"),
    ("ct-fp8-block", DOWN, "input"),
]  # fmt: skip
CUT = [
    ("fp8-block", QUERY, "output", "weight_scale_inv", 48),
    ("ct-fp8-block", KEY, "output", "weight_scale", 32),
    ("ct-fp8-block", OUTPUT, "input", "weight_scale", 48),
    ("ct-w4-sym", DOWN, "input", "weight_scale", 32),
    ("ct-w3-asym", KEY, "output", "weight_zero_point", 32),
    ("ct-w3-asym", DOWN, "input", "weight_packed", 32),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint stored in the way that is named."""
    paths: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in paths:
            paths[name] = write_pair(tmp_path_factory.mktemp(name), CASES[name]).quantized
        return paths[name]

    return write


def claimed(config: dict[str, Any]) -> Any:
    found = [one.load().claim(config) for one in load_plugins().providers("weights")]
    (weight_format,) = [one for one in found if one is not None]
    return weight_format


@pytest.mark.parametrize(("name", "shape", "split"), SHARED)
def test_parts_are_those_of_the_whole(
    written: Callable[[str], Path], name: str, shape: LinearShape, split: str
) -> None:
    path = written(name)
    reader = SafetensorsReader(path)
    weight_format = claimed(reader.config)
    parts = []
    for rank in range(2):
        HeaderCheck(reader, torch.float32, torch.device("meta"), rank, 2).load(weight_format, shape, split)
        loader = WeightLoader(reader, torch.float32, torch.device("cpu"), rank, 2)
        weight = loader.load(weight_format, shape, split).weight
        parts.append(weight.dequantize())
        assert weight.shape == parts[-1].shape
    dense = load_file(path.parent / "dense" / "model.safetensors")[f"{shape.name}.weight"]
    assert parts[0].shape == parts[1].shape
    assert torch.equal(torch.cat(parts, 0 if split == "output" else 1), dense)


@pytest.mark.parametrize(("name", "shape", "split", "suffix", "step"), CUT)
def test_what_ranks_cannot_share_is_told_from_the_header(
    written: Callable[[str], Path], name: str, shape: LinearShape, split: str, suffix: str, step: int
) -> None:
    reader = SafetensorsReader(written(name))
    with pytest.raises(CheckpointError) as caught:
        HeaderCheck(reader, torch.float32, torch.device("meta"), 0, 2).load(claimed(reader.config), shape, split)
    features = shape.out_features if split == "output" else shape.in_features
    assert str(caught.value) == (
        f"Tensor '{shape.name}.{suffix}' goes with {features} features in steps of {step}, which 2 ranks cannot share "
        "evenly."
    )
