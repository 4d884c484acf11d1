"""Layers that AutoAWQ packed, against its own dense weights (tests/data/README.md)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.checkpoints.interface import TensorInfo
from octavo.weights.canonical import GroupedInt, tensor_bytes
from octavo.weights.interface import Activation, LinearShape
from octavo.weights.loader import WeightLoader
from octavo.weights.torch_matmul import TorchMatmul
from octavo_quant_awq.format import AWQ
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "data" / "golden.safetensors"
with safe_open(GOLDEN, framework="pt") as file:
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    CASES = {name: json.loads(text) for name, text in sorted(file.metadata().items())}
UNPADDED = [name for name in CASES if name.startswith("gemm_")]


class Reader:
    """Tensors in memory, of one layer "a"."""

    config: Mapping[str, Any] = {}
    generation_config: Mapping[str, Any] = {}

    def __init__(self, case: str) -> None:
        names = (name for name in TENSORS if name.startswith(f"{case}/"))
        self.params = {f"a.{name.partition('/')[2]}": TENSORS[name] for name in names}

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.params.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.params[name]


def dense_of(case: str) -> torch.Tensor:
    """AutoAWQ's weight [out, in]."""
    return TENSORS[f"dense/{CASES[case]['shape']}"]


def load(case: str, split: str = "output", rank: int = 0, size: int = 1) -> GroupedInt:
    """The layer's weight, or a rank's part of it, as the engine loads it."""
    settings = {name: CASES[case][name] for name in ("version", "group_size")}
    awq = AWQ.claim({"quantization_config": {"quant_method": "awq", "bits": 4, **settings}})
    assert awq is not None
    reader: Any = Reader(case)
    out_features, in_features = dense_of(case).shape
    loader = WeightLoader(reader, torch.float32, torch.device("cpu"), rank, size)
    weight = loader.load(awq, LinearShape("a", in_features, out_features, False), split).weight
    assert isinstance(weight, GroupedInt)
    return weight


def half_ulp(values: torch.Tensor) -> torch.Tensor:
    """Half the distance from each float16 value to the next one away from zero."""
    values = values.half().abs()
    return (torch.nextafter(values, torch.tensor(torch.inf).half()) - values).double() / 2


def test_every_version_is_there() -> None:
    assert {case["version"] for case in CASES.values()} == {"gemm", "gemv", "gemv_fast"}
    assert {case["group_size"] for case in CASES.values()} == {32, 64, 128, -1}
    assert len(CASES) == 15


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["version"] != "gemv_fast"])
def test_the_dense_weight_is_the_librarys(case: str) -> None:
    """Rounded to float16, as the library computes, to the last bit."""
    assert torch.equal(load(case).dequantize().half(), dense_of(case))


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["version"] == "gemv_fast"])
def test_minima_are_the_librarys_rounded_products(case: str) -> None:
    """gemv_fast rounds -scale * zero to float16, so its weight is off by half an ulp of that, and else the same."""
    weight, gemm = load(case), load(case.replace("gemv_fast", "gemm"))
    assert weight.mins is not None and gemm.zeros is not None
    assert torch.equal(weight.codes, gemm.codes)
    assert torch.equal(weight.scales, gemm.scales)
    assert torch.equal(weight.mins, -(gemm.scales * gemm.zero_points()))
    error = (weight.dequantize().double() - dense_of(case).double()).abs()
    minima = weight.mins.repeat_interleave(weight.group_size, 1)
    assert (error <= half_ulp(minima) + half_ulp(dense_of(case))).all()


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["version"] == "gemm"])
def test_the_product_is_the_librarys(case: str) -> None:
    """Both round their weight and their result to float16; the sums between differ in order only."""
    shape = CASES[case]["shape"]
    x, wanted, bias = TENSORS[f"x/{shape}"], TENSORS[f"forward/{shape}"], TENSORS.get(f"bias/{shape}")
    kernel = TorchMatmul()
    got = kernel.apply(Activation(x.float()), kernel.pack(load(case)), None if bias is None else bias.float())
    size = x.double().abs() @ dense_of(case).double().abs().T + (0.0 if bias is None else bias.double().abs())
    assert ((got.double() - wanted.double()).abs() <= 2.0**-10 * size).all()
    assert not torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("case", CASES)
def test_memory_is_as_on_disk(case: str) -> None:
    reader = Reader(case)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in reader.params.values())
    assert tensor_bytes(load(case)) <= 1.05 * stored


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_parts_of_the_outputs_joined_are_the_whole(case: str, size: int) -> None:
    """As ranks have them, and as q, k and v are laid side by side."""
    whole = load(case)
    parts = [load(case, "output", rank, size) for rank in range(size)]
    joined = GroupedInt.join(parts)
    assert joined is not None and joined.features == whole.features
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
    assert torch.equal(joined.dequantize(), whole.dequantize())
    assert tensor_bytes(joined) == tensor_bytes(whole)


@pytest.mark.parametrize("case", UNPADDED)
def test_parts_of_the_inputs_are_the_whole(case: str) -> None:
    size = 5 if "k640" in case else 2
    parts = [load(case, "input", rank, size).dequantize() for rank in range(size)]
    assert torch.equal(torch.cat(parts, 1), load(case).dequantize())
