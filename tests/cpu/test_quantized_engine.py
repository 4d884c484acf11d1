"""A quantized model from end to end, with a format of the test's own: kernels by name, else dequantized in the open."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any, Self

import pytest
import torch
from octavo.engine.loop import Engine
from octavo.errors import PluginError
from octavo.plugins.loading import load_plugins
from octavo.plugins.records import Provider
from octavo.plugins.registry import LoadedPlugin, LoadedProvider, Plugins
from octavo.weights.canonical import ScaledInt8
from octavo.weights.interface import LinearShape, ParamSpec
from safetensors.torch import load_file, save_file
from tiny_models import Reference, run, start, tokens_of

LAYERS = 2 * 7
PROJ = "_proj.weight"


class Rounded:
    """Codes of 8 bits with a scale for each row; the head is dense."""

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """By a name of its own."""
        return cls() if config.get("quantization_config") == {"quant_method": "rounded"} else None

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> Self | None:
        """Never."""
        return None

    def skips(self, module: str) -> bool:
        """The head."""
        return module == "lm_head"

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """Codes and scales."""
        size = (shape.out_features, shape.in_features)
        codes = ParamSpec(suffix="weight", shape=size, dtypes=(torch.int8,), output_axis=0, input_axis=1)
        return [codes, ParamSpec(suffix="scale", shape=(size[0], 1), output_axis=0)]

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledInt8:
        """The tensors as they are."""
        return ScaledInt8(codes=params["weight"], scales=params["scale"].float(), block=(1, shape.in_features))


@pytest.fixture
def rounded(llama: Reference, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model with rounded weights, and the dense model of what they stand for."""
    quantized, dense = (copytree(llama.path, tmp_path / name) for name in ("quantized", "dense"))
    tensors = load_file(llama.path / "model.safetensors")
    values = dict(tensors)
    for name in [name for name in tensors if name.endswith(PROJ)]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        codes = (tensors[name] / scale).round()
        values[name] = codes * scale
        tensors |= {name: codes.to(torch.int8), name.replace("weight", "scale"): scale}
    save_file(values, dense / "model.safetensors")
    save_file(tensors, quantized / "model.safetensors")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "rounded"}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, dense


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Start an engine that knows the format."""
    source = LoadedPlugin("core", "octavo", "0", "octavo.core", builtin=True)
    loaded = LoadedProvider.of("weights", Provider(name="rounded", factory=Rounded, summary="rounded"), source)

    def load(*args: Any, **options: Any) -> Plugins:
        usual = load_plugins(*args, **options)
        providers = [one for kind in usual.by_kind.values() for one in kind]
        return Plugins.of(usual.plugins, usual.failures, [*providers, loaded], usual.manager)

    monkeypatch.setattr("octavo.start.load_plugins", load)
    return partial(start)


def layers_of(engine: Engine) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = engine.capacity.details["layers"]
    return [one for one in layers if one["weight"].startswith("int8")]


def test_float32_gives_the_dense_models_tokens(
    begin: Callable[..., Engine], rounded: tuple[Path, Path], llama: Reference
) -> None:
    """Named kernels leave float32 alone, and say so."""
    quantized, dense = rounded
    engine = begin(quantized, linear_backend=("torch_int8",))
    assert tokens_of(run(engine, llama.prompts)) == tokens_of(run(begin(dense), llama.prompts))
    assert sum(len(one["layers"]) for one in layers_of(engine)) == LAYERS
    assert all("in bfloat16, not in float32" in one["fallback"] for one in layers_of(engine))


def test_bfloat16_keeps_the_codes_where_the_kernel_is_named(
    begin: Callable[..., Engine], rounded: tuple[Path, Path], llama: Reference
) -> None:
    engine = begin(rounded[0], dtype="bfloat16", linear_backend=("torch_int8",))
    served = layers_of(engine)
    assert {(one["matmul"], one["fallback"]) for one in served} == {("torch_int8", None)}
    codes = sum(one["stored_bytes"] for one in served)
    assert sum(one["resident_bytes"] for one in served) < codes, "scales of two bytes for four"
    answers, usual = (run(one, llama.prompts[:4]) for one in (engine, begin(rounded[1], dtype="bfloat16")))
    first = [(a.token_ids[:1], b.token_ids[:1]) for a, b in zip(answers, usual, strict=True)]
    assert all(one == other for one, other in first)


def test_no_kernel_serves_unasked(begin: Callable[..., Engine], rounded: tuple[Path, Path]) -> None:
    engine = begin(rounded[0], dtype="bfloat16")
    assert all("Others serve only when named: torch_int" in one["fallback"] for one in layers_of(engine))
    with pytest.raises(PluginError, match=r"model\.layers\.0\.self_attn\.q_proj would be dequantized"):
        begin(rounded[0], dtype="bfloat16", strict_backends=True)
