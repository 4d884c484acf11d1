"""Weights that the library itself compressed: what it reads back from them, and products with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.weights.canonical import GroupedInt, ScaledFloat8, ScaledInt8, tensor_bytes
from octavo.weights.interface import Activation, LinearShape, ParamSpec, Weight
from octavo.weights.torch_matmul import TorchMatmul
from octavo_quant_compressed_tensors.format import CompressedTensors
from safetensors import safe_open

DATA = Path(__file__).parent / "data"
CASES = sorted(path.stem for path in DATA.glob("*.safetensors"))
FORMATS = {"pack": "pack-quantized", "fp8": "float-quantized", "int8": "int-quantized"}
TYPES = {"pack": GroupedInt, "fp8": ScaledFloat8, "int8": ScaledInt8}


class Case:
    """A file: its tensors, the weight that the library reads, and the format of its config.json."""

    def __init__(self, name: str) -> None:
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
            self.tensors: dict[str, torch.Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.kind = name.split("_")[0]
        self.dense = self.tensors.pop("lib_dequant")
        self.shape = LinearShape("layer", self.dense.shape[1], self.dense.shape[0], False)
        group: dict[str, Any] = {"targets": ["Linear"], "weights": json.loads(metadata["args"])}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": FORMATS[self.kind],
            "config_groups": {"g": group},
        }
        claimed = CompressedTensors.claim({"quantization_config": quantization | {"version": metadata["version"]}})
        assert claimed is not None
        self.format = claimed

    def specs(self) -> list[ParamSpec]:
        return self.format.params(self.shape)

    def weight(self) -> Weight:
        single = {spec.suffix for spec in self.specs() if spec.shape == ()}
        given = {name: tensor.view(()) if name in single else tensor for name, tensor in self.tensors.items()}
        return self.format.weight(self.shape, given, torch.float32)


def test_every_scheme_has_a_file() -> None:
    assert {name.split("_")[0] for name in CASES} == set(FORMATS)
    assert {f"w{bits}" for bits in range(2, 9)} <= {part for name in CASES for part in name.split("_")}
    assert len(CASES) == 21


@pytest.mark.parametrize("name", CASES)
def test_the_files_tensors_are_those_asked_for(name: str) -> None:
    case = Case(name)
    assert {spec.suffix for spec in case.specs()} == set(case.tensors)
    for spec in case.specs():
        stored = case.tensors[spec.suffix]
        assert stored.numel() == 1 if spec.shape == () else stored.shape == spec.shape
        assert stored.dtype in spec.dtypes


@pytest.mark.parametrize("name", CASES)
def test_dequantized_to_the_bits_of_the_library(name: str) -> None:
    """The library rounds the product of code and scale once, to the scales' dtype."""
    case = Case(name)
    weight = case.weight()
    assert type(weight) is TYPES[case.kind]
    assert weight.shape == case.dense.shape
    assert weight.dequantize().dtype is torch.float32
    assert torch.equal(weight.dequantize().to(case.dense.dtype), case.dense)


@pytest.mark.parametrize("name", CASES)
def test_apply_gives_the_dense_product(name: str) -> None:
    case = Case(name)
    matmul, weight = TorchMatmul(), case.weight()
    x = torch.randn(5, case.shape.in_features, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(case.shape.out_features, dtype=torch.float32)
    found = matmul.apply(Activation(x), matmul.pack(weight), bias)
    dense = case.dense.float()
    rounded = torch.finfo(case.dense.dtype).eps * (x.abs() @ dense.abs().t())  # of each of the library's weights
    assert ((found - (x @ dense.t() + bias)).abs() <= rounded + 1e-4).all()


@pytest.mark.parametrize("name", CASES)
def test_resident_bytes_are_the_stored_ones(name: str) -> None:
    """Or fewer: old files' words of 3 and 5 bits have unused ones."""
    case = Case(name)
    stored = tensor_bytes(list(case.tensors.values()))
    assert tensor_bytes(case.weight()) <= 1.05 * stored
