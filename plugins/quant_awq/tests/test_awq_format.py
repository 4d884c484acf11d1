"""Which AWQ checkpoints are claimed, which are refused and how, and what a layer's tensors must be."""

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from octavo.errors import CheckpointError
from octavo.weights.interface import LinearShape
from octavo_quant_awq import plugin
from octavo_quant_awq.format import AWQ

USUAL = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
LAYER = LinearShape("model.layers.0.mlp.up_proj", 256, 192, False)
INT32, INT16 = (torch.int32,), (torch.int16,)


def claim(**changes: Any) -> AWQ:
    """The format of a usual config with these changes; None removes an entry."""
    config = {name: value for name, value in (USUAL | changes).items() if value is not None}
    awq = AWQ.claim({"quantization_config": config})
    assert awq is not None
    return awq


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        claim(**changes)
    return str(caught.value)


def test_the_provider_names_the_format() -> None:
    (provider,) = plugin.octavo_weight_formats()
    assert provider.name == "awq"
    module, name = str(provider.factory).split(":")
    assert getattr(import_module(module), name) is AWQ


def test_the_hook_module_imports_nothing_heavy() -> None:
    code = "import sys, octavo_quant_awq.plugin; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "zero_point": True}},
        {"quantization_config": {"bits": 4, "group_size": 128, "desc_act": False}},
        {"quantization_config": "awq"},
    ],
)
def test_other_checkpoints_are_not_claimed(config: dict[str, Any]) -> None:
    assert AWQ.claim(config) is None


def test_dense_checkpoints_are_not_quantized() -> None:
    assert AWQ.quantize({}) is None


@pytest.mark.parametrize("version", ["gemm", "GEMM", None])
@pytest.mark.parametrize("group_size", [128, 64, -1])
def test_old_spellings(version: str | None, group_size: int) -> None:
    """As quant_config.json had them, which named no method either."""
    old = {"w_bit": 4, "q_group_size": group_size, "zero_point": True, "version": version}
    awq = AWQ.claim({"quantization_config": {name: value for name, value in old.items() if value is not None}})
    assert awq is not None
    assert awq.params(LAYER) == claim(group_size=group_size).params(LAYER)


@pytest.mark.parametrize("bits", [3, 8, None, "4"])
def test_bits_are_refused(bits: Any) -> None:
    assert refusal(bits=bits) == f"The AWQ checkpoint has {bits!r} bits, but AWQ's versions store 4."


@pytest.mark.parametrize("version", ["marlin", "exllama", "llm-awq"])
def test_versions_are_refused(version: str) -> None:
    assert refusal(version=version) == (
        f"The AWQ checkpoint has the version {version!r}, but only gemm, gemv, gemv_fast are read: save it in one of "
        "these."
    )


@pytest.mark.parametrize("group_size", [0, -2, None, "128", 64.0])
def test_group_sizes_are_refused(group_size: Any) -> None:
    assert f"has the group size {group_size!r}, but it must be" in refusal(group_size=group_size)


@pytest.mark.parametrize("names", ["lm_head", [1], [""]])
def test_a_list_of_names_must_be_one(names: Any) -> None:
    assert "modules_to_not_convert is" in refusal(modules_to_not_convert=names)


def test_skipped_modules() -> None:
    plain, chosen = claim(), claim(modules_to_not_convert=["visual", "layers.1."])
    assert not plain.skips("model.layers.1.mlp.up_proj")
    assert chosen.skips("model.layers.1.mlp.up_proj")
    assert chosen.skips("model.visual.blocks.0.qkv")
    assert not chosen.skips("model.layers.11.mlp.up_proj")


@pytest.mark.parametrize(("setting", "skipped"), [(None, True), (False, True), (True, False)])
def test_the_head_is_quantized_where_the_config_says_so(setting: bool | None, skipped: bool) -> None:
    assert claim(lm_head=setting).skips("lm_head") is skipped


@pytest.mark.parametrize(
    ("version", "group_size", "wanted"),
    [
        ("gemm", 64, {"qweight": ((256, 24), INT32), "qzeros": ((4, 24), INT32), "scales": ((4, 192), ())}),
        ("gemm", -1, {"qweight": ((256, 24), INT32), "qzeros": ((1, 24), INT32), "scales": ((1, 192), ())}),
        ("gemv", 64, {"qweight": ((192, 32), INT32), "qzeros": ((192, 2), INT32), "scales": ((192, 16), ())}),
        ("gemv", 32, {"qweight": ((192, 32), INT32), "qzeros": ((192, 4), INT32), "scales": ((192, 32), ())}),
        ("gemv", 128, {"qweight": ((192, 32), INT32), "qzeros": ((192, 1), INT32), "scales": ((192, 8), ())}),
        ("gemv_fast", 64, {"qweight": ((48, 256), INT16), "scales": ((16, 192), ()), "qzeros": ((16, 192), ())}),
    ],
)
def test_tensors(version: str, group_size: int, wanted: dict[str, Any]) -> None:
    specs = claim(version=version, group_size=group_size).params(LAYER)
    assert {spec.suffix: (spec.shape, spec.dtypes) for spec in specs} == wanted


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
@pytest.mark.parametrize("group_size", [128, -1])
def test_axes_and_steps_agree_with_the_shapes(version: str, group_size: int) -> None:
    """Elements times step are the features; unpadded tables of groups part at whole groups or words of them."""
    shape = LinearShape("a", 2048, 64, False)
    for spec in claim(version=version, group_size=group_size).params(shape):
        assert spec.output_axis is not None
        assert spec.shape[spec.output_axis] * spec.per_output == 64
        if spec.suffix != "qweight":
            assert (spec.input_axis is None) == (group_size == -1)
            assert group_size == -1 or spec.per_input in (128, 1024)
        assert spec.input_axis is None or 2048 % spec.per_input == 0


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_padded_groups_cannot_be_parted(version: str) -> None:
    specs = claim(version=version, group_size=64).params(LAYER)
    assert {spec.per_input for spec in specs if spec.suffix != "qweight"} == {256}


@pytest.mark.parametrize(
    ("version", "group_size", "sizes", "words"),
    [
        ("gemm", 96, (256, 192), "has 256 input features, but groups of this AWQ checkpoint need a multiple of 96."),
        (
            "gemm",
            128,
            (256, 36),
            "has 36 output features, but gemm's words of this AWQ checkpoint need a",
        ),
        ("gemv", 128, (320, 64), "has 320 input features, but groups"),
        ("gemv", 96, (192, 64), "has groups of 96 inputs, but AWQ's gemv versions store groups of 32, 64, or 128"),
        ("gemv_fast", 32, (96, 64), "has 96 input features, but gemv_fast's tiles of this AWQ checkpoint need"),
        ("gemv_fast", 64, (64, 6), "has 6 output features, but gemv_fast's tiles of this AWQ checkpoint need"),
    ],
)
def test_layers_that_do_not_fit(version: str, group_size: int, sizes: tuple[int, int], words: str) -> None:
    awq = claim(version=version, group_size=group_size)
    with pytest.raises(CheckpointError) as caught:
        awq.params(LinearShape("model.layers.3.mlp.up_proj", *sizes, False))
    assert str(caught.value).startswith(f"model.layers.3.mlp.up_proj {words}")
