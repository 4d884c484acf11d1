"""HF directories: what is read, and that damaged, unsafe or incomplete ones are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from octavo.checkpoints.dummy import DummyReader
from octavo.checkpoints.interface import TensorInfo
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.errors import CheckpointError
from safetensors.torch import save_file

WEIGHTS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.weight": torch.randn(5).bfloat16(),
    "c.codes": torch.arange(6, dtype=torch.int32),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    return tmp_path


def _save_shards(directory: Path) -> dict[str, str]:
    """Two shards and their index; the weight map is returned."""
    places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(WEIGHTS)}
    for file in set(places.values()):
        save_file({name: WEIGHTS[name] for name in WEIGHTS if places[name] == file}, directory / file)
    _save_index(directory, places)
    return places


def _save_index(directory: Path, places: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _check(reader: SafetensorsReader) -> None:
    assert reader.tensors() == {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in WEIGHTS.items()}
    for name, tensor in WEIGHTS.items():
        assert torch.equal(reader.read(name), tensor)


def test_one_file(directory: Path) -> None:
    save_file(WEIGHTS, directory / "model.safetensors")
    reader = SafetensorsReader(directory)
    _check(reader)
    assert reader.config == {"model_type": "llama"}
    assert reader.generation_config == {"temperature": 0.6}
    assert reader.tokenizer_files() == directory
    reader.close()
    with pytest.raises(CheckpointError, match="has no tensor"):
        reader.read("a.weight")


def test_shards(directory: Path) -> None:
    _save_shards(directory)
    _check(SafetensorsReader(directory))


def test_files_of_other_names(directory: Path) -> None:
    save_file(WEIGHTS, directory / "weights.safetensors")
    save_file({"other.names": torch.ones(1)}, directory / "consolidated.safetensors")
    _check(SafetensorsReader(directory))


def test_tensors_are_mapped(directory: Path) -> None:
    """Each reader has a private mapping of the file."""
    save_file({"big": torch.zeros(1 << 20)}, directory / "model.safetensors")
    first, second = (SafetensorsReader(directory).read("big") for _ in range(2))
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(str(directory / "model.safetensors")) >= 2
    first[0] = 1.0
    assert second[0] == 0.0


def test_generation_config_is_optional(directory: Path) -> None:
    save_file(WEIGHTS, directory / "model.safetensors")
    (directory / "generation_config.json").unlink()
    assert SafetensorsReader(directory).generation_config == {}


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_a_quantization_is_found_beside_config_json(directory: Path, name: str) -> None:
    """Only where config.json describes none; an empty file describes none either."""
    save_file(WEIGHTS, directory / "model.safetensors")
    for other in ("{}", '{"per_channel": true}'):
        (directory / name).write_text(other)
        assert SafetensorsReader(directory).config == {"model_type": "llama"}
    (directory / name).write_text('{"w_bit": 4}')
    for reader in (SafetensorsReader(directory), DummyReader(directory)):
        assert reader.config == {"model_type": "llama", "quantization_config": {"w_bit": 4}}
    (directory / "config.json").write_text('{"quantization_config": {"bits": 8}}')
    assert SafetensorsReader(directory).config == {"quantization_config": {"bits": 8}}


def test_claims_directories_that_look_like_models(tmp_path: Path) -> None:
    assert not SafetensorsReader.claims(tmp_path)
    assert not SafetensorsReader.claims(tmp_path / "missing")
    (tmp_path / "pytorch_model.bin").touch()
    assert SafetensorsReader.claims(tmp_path)
    assert not SafetensorsReader.claims(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickle_is_refused(directory: Path, name: str) -> None:
    torch.save(WEIGHTS, directory / name)
    with pytest.raises(CheckpointError, match=f"pickle files only \\({name}\\).*can run any code.*safetensors"):
        SafetensorsReader(directory)


def test_pickle_beside_safetensors_is_left_alone(directory: Path) -> None:
    save_file(WEIGHTS, directory / "model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    _check(SafetensorsReader(directory))


def test_remote_code_is_not_run(directory: Path) -> None:
    save_file(WEIGHTS, directory / "model.safetensors")
    (directory / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    (directory / "evil.py").write_text("raise SystemExit('executed')")
    _check(SafetensorsReader(directory))


def test_no_weights(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file.*--load-format dummy"):
        SafetensorsReader(directory)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_files_are_named(directory: Path, size: int) -> None:
    path = directory / "model.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read.*fetch it again"):
        SafetensorsReader(directory).tensors()


def test_a_header_that_claims_more_than_the_file_is_refused(directory: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        SafetensorsReader(directory).tensors()


def test_unread_dtypes_are_refused(directory: Path) -> None:
    header = json.dumps({"x": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="'x' has the dtype U64, which is not read"):
        SafetensorsReader(directory).tensors()


def test_a_missing_shard_is_named(directory: Path) -> None:
    places = _save_shards(directory)
    (directory / places["a.weight"]).unlink()
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors is missing"):
        SafetensorsReader(directory)


def test_an_index_that_promises_too_much_is_refused(directory: Path) -> None:
    _save_index(directory, _save_shards(directory) | {"d.weight": "model-0.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors does not hold the tensor 'd\.weight'"):
        SafetensorsReader(directory).tensors()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.bin", 3])
def test_an_index_stays_in_its_directory(directory: Path, name: object) -> None:
    _save_index(directory, {"a.weight": name})
    with pytest.raises(CheckpointError, match=r"only \.safetensors files in the same directory"):
        SafetensorsReader(directory)


@pytest.mark.parametrize("places", [None, {}, []])
def test_an_index_without_a_map_is_refused(directory: Path, places: object) -> None:
    _save_index(directory, places)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        SafetensorsReader(directory)


def test_a_tensor_in_two_files_is_refused(directory: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file(WEIGHTS, directory / name)
    with pytest.raises(CheckpointError, match=r"holds the tensor 'a\.weight' twice"):
        SafetensorsReader(directory).tensors()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '"text"'])
def test_a_damaged_config_is_named(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        SafetensorsReader(directory)


def test_opening_imports_no_torch(directory: Path) -> None:
    save_file(WEIGHTS, directory / "model.safetensors")
    code = (
        "import sys; from pathlib import Path\n"
        "from octavo.checkpoints.safetensors_reader import SafetensorsReader\n"
        "import octavo.checkpoints.resolve\n"
        "SafetensorsReader(Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SHAPES = {
    "x.weight": TensorInfo((400, 50), torch.bfloat16),
    "x.input_layernorm.weight": TensorInfo((8,), torch.float16),
    "x.qweight": TensorInfo((64, 64), torch.int32),
    "x.weight_fp8": TensorInfo((64, 64), torch.float8_e4m3fn),
    "x.flags": TensorInfo((64,), torch.bool),
}


def _dummy(directory: Path, seed: int = 0) -> DummyReader:
    reader = DummyReader(directory, seed=seed)
    reader.declare(SHAPES)
    return reader


def test_dummy_weights_have_the_declared_shapes(directory: Path) -> None:
    reader = _dummy(directory)
    assert reader.tensors() == SHAPES
    for name, info in SHAPES.items():
        assert (tuple(reader.read(name).shape), reader.read(name).dtype) == (info.shape, info.dtype)
    assert torch.equal(reader.read("x.input_layernorm.weight"), torch.ones(8).half())
    assert reader.read("x.weight").float().std().item() == pytest.approx(0.02, rel=0.05)
    assert len(set(reader.read("x.qweight").flatten().tolist())) > 4000
    assert (reader.config, reader.generation_config) == ({"model_type": "llama"}, {"temperature": 0.6})


def test_dummy_weights_depend_on_seed_and_name_only(directory: Path) -> None:
    weight = _dummy(directory, seed=3).read("x.weight")
    again = _dummy(directory, seed=3)
    again.read("x.qweight")
    assert torch.equal(again.read("x.weight"), weight)
    assert not torch.equal(_dummy(directory, seed=4).read("x.weight"), weight)
    again.declare({"y.weight": SHAPES["x.weight"]})
    assert not torch.equal(again.read("y.weight"), weight)


def test_dummy_refuses_what_it_does_not_know(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was not told of a tensor 'z'"):
        _dummy(directory).read("z")
    with pytest.raises(CheckpointError, match=r"needs a directory with config\.json"):
        DummyReader(directory / "config.json")
    assert not DummyReader.claims(directory)
