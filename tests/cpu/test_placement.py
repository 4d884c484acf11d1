"""Which matmul serves which weight: one choice a kind, fallbacks in the open, headers checked before any reading."""

from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from octavo.checkpoints.dummy import DummyReader
from octavo.checkpoints.interface import TensorInfo
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.device import DeviceInfo
from octavo.errors import CheckpointError, PluginError, UnservedError
from octavo.models.builder import ModelBuilder
from octavo.plugins.loading import load_plugins
from octavo.plugins.records import Provider
from octavo.plugins.registry import LoadedPlugin, LoadedProvider, Plugins
from octavo.plugins.selection import Selection, choose
from octavo.runtime.placement import Placement
from octavo.weights.canonical import Dense, ScaledInt8
from octavo.weights.interface import ActivationSpec, LinearShape, MatmulSpec, ParamSpec
from octavo.weights.loader import HeaderCheck, Loaded, WeightLoader
from octavo.weights.torch_matmul import TorchMatmul
from safetensors.torch import load_file, save_file
from tiny_models import Reference, start

CPU = DeviceInfo("cpu", "CPU")


class Rows(TorchMatmul):
    """Serves int8 weights of even widths, anywhere."""

    handles: tuple[type, ...] = (ScaledInt8,)
    input = ActivationSpec()
    features = frozenset({"scales"})

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Odd widths are refused."""
        return "it needs an even width" if spec.in_features % 2 else None


def placement(calls: list[MatmulSpec], strict: bool = False, named: tuple[str, ...] = ()) -> Placement:
    """A placement over torch and `Rows` that notes what it is asked."""
    source = LoadedPlugin("core", "octavo", "0", "octavo.core", builtin=True)
    loaded = [
        LoadedProvider.of("matmul", Provider(name=name, factory=factory, summary=name), source)
        for name, factory in {"rows": Rows, "torch": TorchMatmul}.items()
    ]
    plugins = Plugins.of([source], [], loaded, load_plugins(entry_points=[]).manager)

    def asked(spec: MatmulSpec, reason: Any) -> Selection:
        calls.append(spec)
        return choose(plugins, "matmul", spec, named, strict=strict, build_reason=reason)

    return Placement(asked, torch.bfloat16, CPU, strict)


def int8(out_features: int, in_features: int, by_row: bool = True) -> ScaledInt8:
    block = (1 if by_row else out_features, in_features)
    codes = torch.randint(-127, 127, (out_features, in_features), dtype=torch.int8)
    return ScaledInt8(codes=codes, scales=torch.rand(out_features if by_row else 1, 1), block=block)


def test_one_choice_for_a_type_shape_and_features() -> None:
    calls: list[MatmulSpec] = []
    placed = placement(calls)
    weights = [int8(4, 6), int8(4, 6), int8(4, 6, by_row=False), int8(8, 6), Dense(torch.ones(4, 6))]
    for weight in weights:
        placed.served("layer", weight)
        placed.place(["layer"], weight, 1, str(weight), None)
    assert [(one.weight, one.out_features, one.features.get("scales")) for one in calls] == [
        (ScaledInt8, 4, "row"),
        (ScaledInt8, 4, "tensor"),
        (ScaledInt8, 8, "row"),
        (Dense, 4, None),
    ]
    assert [one.matmul for one in placed.layers] == ["rows"] * 4 + ["torch"]


def test_what_is_placed_is_listed() -> None:
    placed = placement([])
    weight = int8(4, 6)
    assert placed.served("layer", weight) == (weight, None)
    _, packed = placed.place(["a", "b"], weight, 99, "as stored", None)
    assert packed is weight
    assert placed.layers[0].as_dict() == {
        "layers": ["a", "b"],
        "weight": "as stored",
        "matmul": "rows",
        "stored_bytes": 99,
        "resident_bytes": 4 * 6 + 4 * 4,
        "fallback": None,
    }


def test_a_weight_that_none_serves_is_dequantized_with_the_reason() -> None:
    calls: list[MatmulSpec] = []
    placed = placement(calls)
    weight = int8(4, 7)
    dense, reason = placed.served("layer", weight)
    assert isinstance(dense, Dense) and dense.weight.dtype is torch.bfloat16
    assert torch.equal(dense.weight, weight.dequantize().bfloat16())
    assert reason is not None and "rows: it needs an even width" in reason and "at every call" in reason
    assert placed.served("other", weight)[1] == reason and len(calls) == 1


def test_strict_refuses_it_with_the_layers_name() -> None:
    with pytest.raises(UnservedError, match=r"layers\.7\.down would be dequantized.*--strict-backends.*even width"):
        placement([], strict=True).served("layers.7.down", int8(4, 7))


def test_a_dense_weight_has_no_fallback() -> None:
    with pytest.raises(PluginError, match="names rows, but none can serve: rows: it multiplies ScaledInt8 weights"):
        placement([], named=("rows",)).served("layer", Dense(torch.ones(4, 6)))


class WholeTensors(Rows):
    """Serves weights of one scale alone."""

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Rows are refused."""
        return None if spec.features["scales"] == "tensor" else "it takes one scale for a tensor"


def test_parts_are_served_alone_where_the_whole_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, tensors' scales become rows'."""
    monkeypatch.setattr(Rows, "why_not", WholeTensors.why_not)
    place = placement([])
    nothing: Any = None
    builder = ModelBuilder(nothing, nothing, nothing, nothing, place, nothing)
    layers = [Loaded(name, int8(4, 6, by_row=False), 10) for name in ("q", "k")]
    assert len(builder._place(layers)) == 2
    assert [one.layers for one in place.layers] == [("q",), ("k",)] and place.layers[0].matmul == "rows"


def test_a_named_matmul_that_serves_nothing_is_told(llama: Reference, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("octavo_native_cpu")
    start(llama.path, dtype="bfloat16", linear_backend=("torch_int8",))
    assert "names torch_int8, but the model has no layer that they multiply" in caplog.text
    with pytest.raises(PluginError, match="names torch_int8, but the model has no layer"):
        start(llama.path, dtype="bfloat16", linear_backend=("torch_int8",), strict_backends=True)


@pytest.mark.parametrize("named", ["onednn", "torch_int8", "torch_int4"])
def test_a_named_matmul_is_for_weights_of_its_own(llama: Reference, named: str) -> None:
    """What it does not multiply is chosen for as if none were named."""
    pytest.importorskip("octavo_native_cpu")
    engine = start(llama.path, dtype="bfloat16", linear_backend=(named,))
    layers = engine.capacity.details["layers"]
    assert {one["weight"] for one in layers} == {"dense bfloat16"} and all(one["fallback"] is None for one in layers)
    assert len(layers) == 2 * 4 + 1, "qkv, output, gate and up, down of each layer; the head"
    assert layers[0]["layers"] == [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    assert layers[0]["stored_bytes"] == layers[0]["resident_bytes"] * 2, "stored in float32"


class Scaled:
    """A format of a test: int8 codes with a scale for each row."""

    def skips(self, module: str) -> bool:
        """The head is dense."""
        return module == "lm_head"

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """Codes and scales."""
        size = (shape.out_features, shape.in_features)
        return [
            ParamSpec(suffix="weight", shape=size, dtypes=(torch.int8,), output_axis=0, input_axis=1),
            ParamSpec(suffix="weight_scale", shape=(size[0], 1), output_axis=0),
        ]

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> ScaledInt8:
        """The tensors as they are."""
        return ScaledInt8(codes=params["weight"], scales=params["weight_scale"], block=(1, shape.in_features))


SHAPE = LinearShape("proj", 6, 4, False)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"proj.weight": torch.ones(4, 6, dtype=torch.int8)}, r"no tensor 'proj\.weight_scale'"),
        ({"proj.weight": torch.ones(4, 6).int(), "proj.weight_scale": torch.ones(4, 1)}, "is int32, but .* int8"),
        (
            {"proj.weight": torch.ones(4, 6, dtype=torch.int8), "proj.weight_scale": torch.ones(4, 2)},
            r"weight_scale' has shape \[4, 2\], but config.json asks for \[4, 1\]",
        ),
    ],
    ids=["no scales", "other codes", "other scales"],
)
def test_headers_of_a_quantized_layer(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    check = HeaderCheck(SafetensorsReader(tmp_path), torch.float32, torch.device("meta"))
    with pytest.raises(CheckpointError, match=message):
        check.load(Scaled(), SHAPE, "output")  # type: ignore[arg-type]


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read."""
    names: list[str] = []
    read = SafetensorsReader.read

    def counted(self: SafetensorsReader, name: str) -> torch.Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsReader, "read", counted)
    return names


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_missing_tensor_is_told_before_any_is_read(
    llama: Reference, tmp_path: Path, num_files: int, reads: list[str]
) -> None:
    directory = copytree(llama.path, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for number in range(num_files):
        part = {name: tensors[name] for name in list(tensors)[number::num_files] if name != LAST}
        save_file(part, directory / f"part-{number}.safetensors")
    with pytest.raises(CheckpointError, match=f"no tensor '{LAST}'"):
        start(directory)
    assert reads == []
    start(llama.path)
    assert LAST in reads


def test_dummy_weights_have_no_headers(llama: Reference) -> None:
    engine = start(llama.path, load_format="dummy")
    assert all(isinstance(one["stored_bytes"], int) for one in engine.capacity.details["layers"])
    assert DummyReader(llama.path).tensors() == {}


@pytest.mark.parametrize(("suffix", "dense"), [("qweight", False), ("weight_scale", False), ("bias", True)])
def test_a_skipped_layer_that_is_stored_packed_is_believed(suffix: str, dense: bool) -> None:
    class Reader:
        def tensors(self) -> dict[str, TensorInfo]:
            return {f"lm_head.{suffix}": TensorInfo((1,), torch.int32)}

    loader = WeightLoader(Reader(), torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    assert loader.holds_dense(Scaled(), LinearShape("lm_head", 8, 8, True)) is dense  # type: ignore[arg-type]
