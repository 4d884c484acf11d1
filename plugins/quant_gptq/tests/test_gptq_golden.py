"""Layers that AutoGPTQ and GPTQModel packed, against their own dense weights (tests/data/README.md)."""

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
from octavo_quant_gptq.format import GPTQ
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "data" / "golden.safetensors"
with safe_open(GOLDEN, framework="pt") as file:
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    CASES: dict[str, dict[str, Any]] = {name: json.loads(text) for name, text in sorted(file.metadata().items())}
PARAMS = ("qweight", "qzeros", "scales", "g_idx")


class Reader:
    """Tensors in memory, of one layer "a"."""

    config: Mapping[str, Any] = {}
    generation_config: Mapping[str, Any] = {}

    def __init__(self, case: str, without: str = "") -> None:
        self.params = {f"a.{name}": TENSORS[f"{case}/{name}"] for name in PARAMS if name != without}

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.params.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.params[name]


def dense_of(case: str) -> torch.Tensor:
    """The library's weight [out, in]."""
    return TENSORS[f"{case}/dense"]


def load(
    case: str, split: str = "output", rank: int = 0, size: int = 1, reader: Reader | None = None, **settings: Any
) -> GroupedInt:
    """The layer's weight, or a rank's part of it, as the engine loads it."""
    gptq = GPTQ.claim({"quantization_config": {"quant_method": "gptq", **CASES[case], **settings}})
    assert gptq is not None
    source: Any = reader or Reader(case)
    out_features, in_features = dense_of(case).shape
    loader = WeightLoader(source, torch.float32, torch.device("cpu"), rank, size)
    weight = loader.load(gptq, LinearShape("a", in_features, out_features, False), split).weight
    assert isinstance(weight, GroupedInt)
    return weight


def test_every_kind_is_there() -> None:
    assert {case["bits"] for case in CASES.values()} == {2, 3, 4, 8}
    assert {case["group_size"] for case in CASES.values()} == {32, 64, 128, -1}
    assert len(CASES) == 31


@pytest.mark.parametrize("case", CASES)
def test_the_dense_weight_is_the_librarys(case: str) -> None:
    """To the last bit: AutoGPTQ's in float32, GPTQModel's rounded to float16 as it computes."""
    dense = dense_of(case)
    assert dense.dtype is (torch.float32 if case.startswith("autogptq") else torch.float16)
    assert torch.equal(load(case).dequantize().to(dense.dtype), dense)


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_the_dense_one(case: str) -> None:
    x = torch.randn(5, dense_of(case).shape[1])
    kernel = TorchMatmul()
    got = kernel.apply(Activation(x), kernel.pack(load(case)), None)
    dense = dense_of(case).double()
    size = x.double().abs() @ dense.abs().T
    rounded = 2.0**-11 if case.startswith("gptqmodel") else 0.0  # the library's weight in float16
    assert ((got.double() - x.double() @ dense.T).abs() <= (rounded + 300 * 2.0**-24) * size).all()


@pytest.mark.parametrize("case", CASES)
def test_what_symmetry_and_order_make_superfluous_is_dropped(case: str) -> None:
    """A static_groups checkpoint has desc_act, but its groups are in order."""
    weight = load(case)
    assert (weight.zeros is None) == CASES[case]["sym"]
    assert (weight.group_of is not None) == (CASES[case]["desc_act"] and "static" not in case)


@pytest.mark.parametrize("case", CASES)
def test_symmetry_is_read_off_the_zero_points(case: str) -> None:
    """Whatever `sym` says, or where it says nothing, the weight is the same."""
    settings = {name: value for name, value in CASES[case].items() if name != "sym"}
    for other in ({"sym": not CASES[case]["sym"]}, {}):
        gptq = GPTQ.claim({"quantization_config": {"quant_method": "gptq", **settings, **other}})
        assert gptq is not None
        shape = LinearShape("a", dense_of(case).shape[1], dense_of(case).shape[0], False)
        weight = gptq.weight(shape, {name: TENSORS[f"{case}/{name}"] for name in PARAMS}, torch.float32)
        assert torch.equal(weight.dequantize().to(dense_of(case).dtype), dense_of(case))


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("_gptq")])
def test_both_versions_give_the_same_zero_points(case: str) -> None:
    """Version 1 of a zero point of 0 borrows from the next, which only adding to the whole word gives back."""
    first, second = load(case), load(f"{case}_v2")
    assert torch.equal(first.codes, second.codes)
    if first.zeros is None or second.zeros is None:
        assert first.zeros is second.zeros
    else:
        assert torch.equal(first.zeros, second.zeros)
        assert ("zero0" in case) == bool((first.zero_points() == 0).any())


@pytest.mark.parametrize("case", CASES)
def test_memory_is_as_on_disk(case: str) -> None:
    """Zero points take a byte each and are the more the smaller the groups; a g_idx in order takes nothing."""
    weight, reader = load(case), Reader(case, without="" if load(case).group_of is not None else "g_idx")
    stored = sum(tensor.numel() * tensor.element_size() for tensor in reader.params.values())
    assert tensor_bytes(weight) <= 1.05 * stored


@pytest.mark.parametrize("case", [name for name in CASES if not CASES[name]["desc_act"]])
def test_no_g_idx_means_order(case: str) -> None:
    empty = Reader(case)
    empty.params["a.g_idx"] = torch.zeros_like(empty.params["a.g_idx"])
    for reader in (Reader(case, without="g_idx"), empty):
        assert torch.equal(load(case, reader=reader).dequantize(), load(case).dequantize())


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["bits"] != 3 and "_640x" not in name])
def test_parts_of_the_outputs_joined_are_the_whole(case: str) -> None:
    """As ranks have them, and as q, k and v are laid side by side."""
    whole = load(case)
    parts = [load(case, "output", rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
    joined = GroupedInt.join(parts)
    assert joined is not None and joined.features == whole.features
    assert torch.equal(joined.dequantize(), whole.dequantize())
    assert tensor_bytes(joined) == tensor_bytes(whole)


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["bits"] == 3])
def test_layers_of_3_bits_are_joined(case: str) -> None:
    """32 outputs are the fewest that their zero points can be parted at."""
    joined = GroupedInt.join([load(case)] * 3)
    assert joined is not None
    assert torch.equal(joined.dequantize(), load(case).dequantize().repeat(3, 1))


@pytest.mark.parametrize("case", CASES)
def test_parts_of_the_inputs_are_the_whole(case: str) -> None:
    """Ranks share the groups; where any input may be of any group, each rank has all of them."""
    parts = [load(case, "input", rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), load(case).dequantize())
    if "static" in case:
        assert all(part.group_of is None and part.scales.shape[1] == 2 for part in parts)


@pytest.mark.parametrize("case", ["autogptq_b4_g64_sym_act", "autogptq_b3_g32_asym_act"])
def test_layers_with_other_orders_are_not_joined(case: str) -> None:
    other = Reader(case)
    other.params["a.g_idx"] = other.params["a.g_idx"].flip(0).contiguous()
    assert GroupedInt.join([load(case), load(case, reader=other)]) is None
