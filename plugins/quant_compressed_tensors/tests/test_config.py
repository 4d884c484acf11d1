"""Which layers a config.json quantizes and how, what it is refused for, and what contradicts it in the tensors."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import GroupedInt
from octavo.weights.interface import LinearShape
from octavo_quant_compressed_tensors.format import CompressedTensors
from octavo_quant_compressed_tensors.packed import Packed
from octavo_quant_compressed_tensors.scaled import Scaled

FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
SHAPE = LinearShape("model.layers.3.mlp.up_proj", 96, 40, False)
ROWS = (1, 0)


def group(weights: object = INT4, targets: object = ("Linear",), **more: Any) -> dict[str, Any]:
    return {"targets": list(targets) if isinstance(targets, tuple) else targets, "weights": weights, **more}


def quantization(*groups: Mapping[str, Any], layout: object = "pack-quantized", **more: Any) -> dict[str, Any]:
    named = {f"group_{index}": one for index, one in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": named, "version": "0.19.0", **more}


def claim(*groups: Mapping[str, Any], **more: Any) -> CompressedTensors:
    claimed = CompressedTensors.claim({"quantization_config": quantization(*groups, **more)})
    assert claimed is not None
    return claimed


def test_claims_its_own_only() -> None:
    for config in ({}, {"quantization_config": None}, {"quantization_config": {"quant_method": "fp8"}}):
        assert CompressedTensors.claim(config) is None
    assert CompressedTensors.claim({"quantization_config": {"bits": 4}}) is None
    assert CompressedTensors.quantize({}) is None


def test_old_spellings_are_read() -> None:
    old = quantization(group(), quantization_status="frozen")
    assert CompressedTensors.claim({"compression_config": old}) == claim(group())
    assert CompressedTensors.claim({"quantization_config": old | {"quant_method": "compressed_tensors"}}) is not None
    assert CompressedTensors.claim({"compression_config": {k: old[k] for k in old if k != "quant_method"}}) is not None


def test_what_does_not_touch_weights_is_accepted() -> None:
    claim(
        group(output_activations={"num_bits": 8}),
        kv_cache_scheme={"num_bits": 8, "type": "float"},
        sparsity_config={"format": "dense", "global_sparsity": 0.13},
        transform_config={"config_groups": {}},
    )


@pytest.mark.parametrize(
    ("targets", "ignored", "quantized"),
    [
        (["Linear"], [], True),
        (["Linear"], [SHAPE.name], False),
        (["Linear"], ["model.layers.3.mlp"], True),
        (["Linear"], ["re:.*mlp.*"], False),
        (["Linear"], ["re:mlp"], True),
        (["Linear"], ["Linear"], False),
        (["Embedding", "LlamaAttention"], [], False),
        ([SHAPE.name], [], True),
        (["re:.*up_proj$"], [], True),
        (["re:.*down_proj$"], [], False),
        ([], [], False),
    ],
)
def test_targets_and_ignore(targets: list[str], ignored: list[str], quantized: bool) -> None:
    assert claim(group(targets=targets), ignore=ignored).skips(SHAPE.name) is not quantized


def test_a_layer_has_the_scheme_that_names_it_most_closely() -> None:
    mixed = claim(
        group(FP8, format="float-quantized"),
        group(INT8, ("re:.*self_attn.*",), format="int-quantized"),
        group(INT4, ("model.layers.0.self_attn.q_proj",), format="pack-quantized"),
        group(None, ("re:.*embed.*",)),
        layout="mixed-precision",
    )
    found = {name: mixed._scheme(name) for name in ("lm_head", "a.self_attn.k", "model.layers.0.self_attn.q_proj")}
    assert list(found.values()) == [
        Scaled(torch.float8_e4m3fn, ROWS, False),
        Scaled(torch.int8, ROWS, False),
        Packed(4, 32, True, False, False),
    ]
    assert mixed.skips("model.embed_tokens")


@pytest.mark.parametrize(
    ("weights", "layout", "wanted"),
    [
        ({"num_bits": 8, "type": "float"}, "float-quantized", Scaled(torch.float8_e4m3fn, (0, 0), False)),
        ({"num_bits": 8, "group_size": -1}, "int-quantized", Scaled(torch.int8, ROWS, False)),
        ({"num_bits": 8, "group_size": 32}, "naive-quantized", Scaled(torch.int8, (1, 32), False)),
        (FP8, "naive-quantized", Scaled(torch.float8_e4m3fn, ROWS, False)),
        ({"num_bits": 4, "group_size": -1}, "pack-quantized", Packed(4, None, True, False, False)),
        ({**INT4, "actorder": "weight"}, "pack-quantized", Packed(4, 32, True, False, False)),
        ({**INT4, "actorder": "group"}, "pack-quantized", Packed(4, 32, True, True, False)),
        ({**INT4, "symmetric": False}, "pack-quantized", Packed(4, 32, False, False, False)),
        (INT4, "dense", None),
    ],
)
def test_schemes(weights: dict[str, Any], layout: str, wanted: object) -> None:
    assert claim(group(weights), layout=layout)._scheme(SHAPE.name) == wanted


@pytest.mark.parametrize(
    ("inputs", "static"),
    [
        (None, False),
        (STATIC, True),
        ({**STATIC, "dynamic": True, "strategy": "token"}, False),
        ({**STATIC, "symmetric": False}, False),
        ({**STATIC, "strategy": "channel"}, False),
    ],
)
def test_static_scales_of_inputs_are_kept_where_they_are_one_and_symmetric(inputs: object, static: bool) -> None:
    found = claim(group(FP8, input_activations=inputs), layout="float-quantized")
    suffixes = [spec.suffix for spec in found.params(SHAPE)]
    assert suffixes == ["weight", "weight_scale", *(["input_scale"] if static else [])]
    params = {"weight": torch.zeros(40, 96, dtype=torch.float8_e4m3fn), "weight_scale": torch.ones(40, 1).bfloat16()}
    kept: Any = found.weight(SHAPE, params | {"input_scale": torch.tensor(0.5).bfloat16()}, torch.float32)
    assert kept.features["input_scale"] is static
    assert kept.input_scale == torch.tensor(0.5) if static else kept.input_scale is None


@pytest.mark.parametrize(("version", "width"), [("0.19.0", 9), ("0.18.0", 9), ("1.0", 9), ("0.17.1", 10), (None, 10)])
def test_words_before_0_18_hold_whole_codes(version: str | None, width: int) -> None:
    old = claim(group({**INT4, "num_bits": 3}), version=version)
    assert {spec.suffix: spec.shape for spec in old.params(SHAPE)}["weight_packed"] == (40, width)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"layout": "nvfp4-pack-quantized"}, "'group_0' has the format 'nvfp4-pack-quantized'"),
        ({"layout": "mxfp4-pack-quantized"}, "mxfp4"),
        ({"layout": None}, "None"),
        ({"weights": {**INT4, "num_bits": 1}}, "1 bits"),
        ({"weights": {**INT4, "num_bits": 9}}, "9 bits"),
        ({"weights": {**INT4, "num_bits": 4.0}}, "4.0 bits"),
        ({"weights": {**INT4, "type": "float"}}, "'float'"),
        ({"weights": {**INT4, "strategy": "tensor"}}, "by tensor"),
        ({"weights": {**INT4, "strategy": "tensor_group"}}, "by tensor_group"),
        ({"weights": {**INT4, "group_size": None}}, "group_size of None"),
        ({"weights": {**INT8, "actorder": "group"}}, "actorder"),
        ({"layout": "int-quantized", "weights": {**INT8, "symmetric": False}}, "asymmetric"),
        ({"layout": "int-quantized", "weights": {**INT8, "strategy": "token"}}, "by token"),
        ({"layout": "int-quantized", "weights": {**INT8, "num_bits": 4}}, "4 bits"),
        ({"layout": "int-quantized", "weights": {**INT8, "actorder": "group"}}, "actorder"),
        ({"layout": "int-quantized", "weights": FP8}, "'float'"),
        ({"layout": "float-quantized", "weights": INT8}, "'int'"),
        ({"layout": "float-quantized", "weights": {**FP8, "num_bits": 4}}, "4 bits"),
        ({"layout": "float-quantized", "weights": {**FP8, "strategy": "block"}}, "block_structure None"),
        (
            {"layout": "float-quantized", "weights": {**FP8, "strategy": "block", "block_structure": [128, 0]}},
            "[128, 0]",
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "transforms (u)"),
        ({"sparsity_config": [1]}, "sparsity_config [1]"),
        ({"targets": None}, "targets"),
        ({"targets": ["re:("]}, "no regular expression"),
        ({"ignore": ["re:*"]}, "ignore"),
        ({"ignore": "lm_head"}, "list of names"),
        ({"weights": [4]}, "weights [4]"),
        ({"config_groups": [1]}, "config_groups [1]"),
        ({"config_groups": {"g": None}}, "'g' is None"),
    ],
)
def test_refusals(given: dict[str, Any], found: str) -> None:
    own = {name: given.pop(name) for name in ("weights", "targets") if name in given}
    with pytest.raises(CheckpointError) as caught:
        claim(group(**own), **given)
    assert str(caught.value).startswith("The compressed-tensors checkpoint")
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "layout"), [(INT4, "pack-quantized"), ({**INT8, **INT4, "num_bits": 8}, "int-quantized")]
)
def test_groups_must_divide(weights: dict[str, Any], layout: str) -> None:
    found = claim(group(weights), layout=layout)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.3\.mlp\.up_proj has 100 inputs, which groups of 32"):
        found.params(LinearShape(SHAPE.name, 100, 40, False))


def test_a_layer_that_is_ignored_but_stored_quantized() -> None:
    with pytest.raises(CheckpointError, match=rf"^{SHAPE.name} is stored quantized, but"):
        claim(group(), ignore=[SHAPE.name]).params(SHAPE)


def packed(g_idx: torch.Tensor | None = None, num_groups: int = 3, **more: torch.Tensor) -> GroupedInt:
    """A layer of 40 x 96 codes of 0 with scales of 1."""
    found = claim(group({**INT4, "actorder": None if g_idx is None else "group"}))
    params = {"weight_packed": torch.zeros(40, 12, dtype=torch.int32), "weight_scale": torch.ones(40, num_groups)}
    if g_idx is not None:
        params["weight_g_idx"] = g_idx.int()
    weight = found.weight(SHAPE, params | more, torch.float32)
    assert isinstance(weight, GroupedInt)
    return weight


@pytest.mark.parametrize("size", [[40, 96], [80, 96], [40, 192]])
def test_the_stored_shape_is_the_layers_or_that_of_all_ranks(size: list[int]) -> None:
    assert packed(weight_shape=torch.tensor(size)).shape == (40, 96)


@pytest.mark.parametrize("size", [[40, 90], [20, 96], [0, 96], [-40, 96]])
def test_a_stored_shape_that_contradicts(size: list[int]) -> None:
    with pytest.raises(CheckpointError, match=rf"^{SHAPE.name}.weight_shape is "):
        packed(weight_shape=torch.tensor(size))


def test_groups_that_nobody_ordered_follow_one_another() -> None:
    assert packed(torch.full((96,), -1)).group_of is None
    with pytest.raises(CheckpointError, match="gives no groups"):
        packed(torch.full((96,), -1), num_groups=6)  # a rank's part of the inputs, with the scales of all groups


def test_a_group_that_is_not_there() -> None:
    assert packed(torch.full((96,), 2)).group_of is not None
    with pytest.raises(CheckpointError, match="names group 3, but there are 3 groups"):
        packed(torch.full((96,), 3))
