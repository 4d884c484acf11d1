"""Layers that AutoAWQ and AutoGPTQ have packed are read as those libraries themselves read them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from environments import pack
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.plugins.loading import load_plugins
from octavo.weights.interface import LinearShape, WeightFormat
from octavo.weights.loader import WeightLoader
from packed_layers import load_dense

pytestmark = pytest.mark.slow

ROUNDS = 8


def format_of(config: dict[str, Any]) -> WeightFormat:
    """The one format that claims a checkpoint with this config.json."""
    formats: list[Any] = [provider.load() for provider in load_plugins().providers("weights")]
    (claimed,) = (claim for claim in (one.claim(config) for one in formats) if claim is not None)
    return claimed


def read(folder: Path) -> torch.Tensor:
    """The dense weight [out, in] in float32, loaded as the engine loads it."""
    reader = SafetensorsReader(folder)
    loader = WeightLoader(reader, torch.float32, torch.device("cpu"))
    shape = LinearShape(**reader.config["shape"])
    return loader.load(format_of(reader.config), shape, "output").weight.dequantize()


def agrees(folder: Path) -> bool:
    """Whether our dense weight rounds to the library's in float16, bit for bit.

    Layers with stored minima have more to round: the minimum in the file (by half an ulp: at most 2^-11 of it), and
    the library's weight, which was made without it.
    """
    ours, dense = read(folder), load_dense(folder)
    if "minima" not in dense:
        return torch.equal(ours.half(), dense["weight"])
    bound = (dense["weight"].float().abs() + dense["minima"].float().abs()) * 2**-11
    return bool(((ours - dense["weight"].float()).abs() <= bound).all())


@pytest.mark.parametrize(
    ("requirement", "script", "layers_per_round"),
    [("autoawq==0.2.9", "pack_awq.py", 3), ("auto-gptq==0.7.1", "pack_gptq.py", 16)],
    ids=["awq", "gptq"],
)
def test_packed_layers_are_read_as_their_library_reads_them(
    tmp_path: Path, requirement: str, script: str, layers_per_round: int
) -> None:
    verdicts = {folder.name: agrees(folder) for folder in pack(requirement, script, tmp_path, ROUNDS)}
    assert len(verdicts) == ROUNDS * layers_per_round
    assert sorted(name for name, good in verdicts.items() if not good) == []
