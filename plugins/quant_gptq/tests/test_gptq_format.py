"""Which GPTQ checkpoints are claimed, which are refused and how, and what a layer's tensors must be."""

import subprocess
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from octavo.errors import CheckpointError
from octavo.weights.interface import LinearShape
from octavo_quant_gptq import plugin
from octavo_quant_gptq.format import GPTQ

USUAL = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
LAYER = LinearShape("model.layers.0.mlp.up_proj", 256, 192, False)
WORDS_OF_EIGHTS = 0x77777777  # zero points of 8, as version 1 has them


def claim(**changes: Any) -> GPTQ:
    """The format of a usual config with these changes; None removes an entry."""
    config = {name: value for name, value in (USUAL | changes).items() if value is not None}
    gptq = GPTQ.claim({"quantization_config": config})
    assert gptq is not None
    return gptq


def refusal(**changes: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        claim(**changes)
    return str(caught.value)


def shapes(gptq: GPTQ, shape: LinearShape = LAYER) -> dict[str, tuple[int, ...]]:
    return {spec.suffix: spec.shape for spec in gptq.params(shape)}


def params(g_idx: list[int], **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of a layer of 4 groups of 32 inputs and 8 outputs."""
    return {
        "qweight": torch.arange(16 * 8, dtype=torch.int32).view(16, 8),
        "qzeros": torch.full((4, 1), WORDS_OF_EIGHTS, dtype=torch.int32),
        "scales": torch.arange(1.0, 33.0).view(4, 8).half(),
        "g_idx": torch.tensor(g_idx, dtype=torch.int32),
        **changes,
    }


def test_the_provider_names_the_format() -> None:
    (provider,) = plugin.octavo_weight_formats()
    assert provider.name == "gptq"
    module, name = str(provider.factory).split(":")
    assert getattr(import_module(module), name) is GPTQ


def test_the_hook_module_imports_nothing_heavy() -> None:
    code = "import sys, octavo_quant_gptq.plugin; sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "desc_act": False}},
        {"quantization_config": {"w_bit": 4, "q_group_size": 128, "zero_point": True}},
        {"quantization_config": "gptq"},
    ],
)
def test_other_checkpoints_are_not_claimed(config: dict[str, Any]) -> None:
    assert GPTQ.claim(config) is None


def test_dense_checkpoints_are_not_quantized() -> None:
    assert GPTQ.quantize({}) is None


def test_an_old_file_without_a_method_is_claimed() -> None:
    assert shapes(claim(quant_method=None)) == shapes(claim())


@pytest.mark.parametrize("bits", [1, 5, 6, 7, 16, None, "4"])
def test_bits_are_refused(bits: Any) -> None:
    assert refusal(bits=bits) == f"The GPTQ checkpoint has {bits!r} bits, but only 2, 3, 4, 8 are read."


@pytest.mark.parametrize("group_size", [0, -2, None, "128", 64.0])
def test_group_sizes_are_refused(group_size: Any) -> None:
    assert f"has the group size {group_size!r}, but it must be" in refusal(group_size=group_size)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"format": "bitblas"}, "bitblas"),
        ({"is_marlin_format": True, "checkpoint_format": "gptq"}, "marlin"),
    ],
)
def test_formats_are_refused(changes: dict[str, Any], name: str) -> None:
    assert refusal(**changes) == (
        f"The GPTQ checkpoint has the format {name!r}, but only gptq and gptq_v2 are read: save it in one of these."
    )


@pytest.mark.parametrize("pack_dtype", ["int8", "int16", "int64"])
def test_words_are_refused(pack_dtype: str) -> None:
    assert f"is packed into {pack_dtype}, but only int32 is read" in refusal(pack_dtype=pack_dtype)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
def test_formats_are_read_under_both_keys(name: str) -> None:
    assert claim(checkpoint_format=name, pack_dtype="int32").is_v1 == claim(format=name).is_v1 == (name == "gptq")
    assert claim().is_v1


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({"up_proj": {"bits": 5}}, "The GPTQ checkpoint's dynamic entry 'up_proj' has 5 bits"),
        ({"+:up_proj": {"group_size": 0}}, "The GPTQ checkpoint's dynamic entry '+:up_proj' has the group size 0"),
        ({"-:(": {}}, "dynamic has the pattern '-:(', which is no regular expression"),
        (["up_proj"], "dynamic is ['up_proj'], but must be an object"),
    ],
)
def test_rules_are_refused(dynamic: Any, words: str) -> None:
    assert words in refusal(dynamic=dynamic)


def test_rules() -> None:
    """The first that matches from the name's beginning counts; what it does not change is as elsewhere."""
    dynamic = {
        "-:.*down_proj": {},
        r"+:.*\.0\..*up_proj": {"bits": 8, "group_size": 64},
        r".*\.0\.": {"desc_act": True},
        "mlp": {"bits": 2},
    }
    gptq = claim(dynamic=dynamic)
    assert gptq.skips("model.layers.0.mlp.down_proj")
    assert not gptq.skips("model.layers.0.mlp.up_proj")
    assert shapes(gptq) == {"qweight": (64, 192), "qzeros": (4, 48), "scales": (4, 192), "g_idx": (256,)}
    in_order, in_any_order = (
        {spec.suffix: spec.input_axis for spec in gptq.params(LinearShape(name, 256, 8, False))}
        for name in ("model.layers.1.mlp.gate_proj", "model.layers.0.mlp.gate_proj")
    )
    assert in_order == {"qweight": 0, "qzeros": 0, "scales": 0, "g_idx": None}
    assert in_any_order == {"qweight": 0, "qzeros": None, "scales": None, "g_idx": 0}


@pytest.mark.parametrize(("setting", "skipped"), [(None, True), (False, True), (True, False)])
def test_the_head_is_quantized_where_the_config_says_so(setting: bool | None, skipped: bool) -> None:
    assert claim(lm_head=setting).skips("lm_head") is skipped


@pytest.mark.parametrize(
    ("bits", "group_size", "wanted"),
    [
        (2, 64, ((16, 192), (4, 12), (4, 192))),
        (3, 64, ((24, 192), (4, 18), (4, 192))),
        (4, 96, ((32, 192), (3, 24), (3, 192))),  # the last group is shorter
        (4, 512, ((32, 192), (1, 24), (1, 192))),
        (8, -1, ((64, 192), (1, 48), (1, 192))),
    ],
)
def test_shapes(bits: int, group_size: int, wanted: tuple[tuple[int, ...], ...]) -> None:
    found = shapes(claim(bits=bits, group_size=group_size))
    assert (found["qweight"], found["qzeros"], found["scales"]) == wanted


@pytest.mark.parametrize(
    ("bits", "sizes", "words"),
    [
        (4, (100, 192), "has 100 input features, but 4-bit GPTQ needs a multiple of 8."),
        (2, (64, 8), "has 8 output features, but 2-bit GPTQ needs a multiple of 16."),
        (3, (48, 32), "has 48 input features, but 3-bit GPTQ needs a multiple of 32."),
        (8, (64, 6), "has 6 output features, but 8-bit GPTQ needs a multiple of 4."),
    ],
)
def test_layers_that_do_not_fit(bits: int, sizes: tuple[int, int], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        claim(bits=bits).params(LinearShape("model.layers.3.mlp.up_proj", *sizes, False))
    assert str(caught.value) == f"model.layers.3.mlp.up_proj {words}"


@pytest.mark.parametrize("wrong", [-1, 4])
@pytest.mark.parametrize("desc_act", [False, True])
def test_groups_that_are_not_there_are_refused(wrong: int, desc_act: bool) -> None:
    gptq, shape = claim(group_size=32, desc_act=desc_act), LinearShape("layer", 128, 8, False)
    g_idx = [k // 32 for k in range(128)]
    g_idx[5] = wrong
    low, high = min(0, wrong), max(3, wrong)
    with pytest.raises(CheckpointError, match=rf"layer\.g_idx has values from {low} to {high}, .* has 4 groups"):
        gptq.weight(shape, params(g_idx), torch.float32)


def test_a_short_last_group() -> None:
    gptq, shape = claim(group_size=48), LinearShape("layer", 128, 8, False)
    scales = torch.tensor([[1.0], [2.0], [4.0]]).half().expand(3, 8)
    qzeros = torch.full((3, 1), WORDS_OF_EIGHTS, dtype=torch.int32)
    given = params([k // 48 for k in range(128)], scales=scales, qzeros=qzeros)
    found = gptq.weight(shape, given, torch.float32).dequantize()
    for n in range(8):
        for k in range(128):
            code = int(given["qweight"][k // 8, n]) >> (4 * (k % 8)) & 15
            assert found[n, k] == (code - 8) * [1.0, 2.0, 4.0][k // 48]


def test_ranks_need_what_tells_them_their_groups() -> None:
    """Rank 1 of 2, which has all groups, or inputs in an order that the config denies."""
    shape = LinearShape("layer", 64, 8, False)
    qweight = torch.zeros(8, 8, dtype=torch.int32)
    with pytest.raises(CheckpointError, match="layer has desc_act but no g_idx"):
        claim(group_size=32, desc_act=True).weight(shape, params([0] * 64, qweight=qweight), torch.float32)
    with pytest.raises(CheckpointError, match=r"layer\.g_idx is in no order, though config.json says"):
        claim(group_size=32).weight(shape, params([k % 4 for k in range(128)], qweight=qweight), torch.float32)


@pytest.mark.parametrize(
    ("bits", "stored", "wanted"),
    [
        (4, 0x77777777, [8] * 8),
        (4, 0xEEEEEEEF, [0] * 8),  # 0 - 0x11111111
        (4, 0xFFFFFFFF, [0, 1, 1, 1, 1, 1, 1, 1]),  # 15 + 1 carries into the next, and out of the word
        (4, 0x0000000F, [0, 2, 1, 1, 1, 1, 1, 1]),
        (8, 0x7FFFFFFE, [255, 0, 1, 129]),
    ],
)
def test_version_1_adds_to_whole_words(bits: int, stored: int, wanted: list[int]) -> None:
    word = stored - (1 << 32) if stored >> 31 else stored
    shape = LinearShape("layer", 32, len(wanted), False)
    given = {
        "qweight": torch.zeros(bits, len(wanted), dtype=torch.int32),
        "qzeros": torch.tensor([[word]], dtype=torch.int32),
        "scales": torch.ones(1, len(wanted)).half(),
    }
    weight = claim(bits=bits, group_size=32).weight(shape, given, torch.float32)
    mid = 1 << (bits - 1)
    assert weight.zero_points()[:, 0].tolist() == wanted
    assert (weight.zeros is None) == (set(wanted) == {mid})
