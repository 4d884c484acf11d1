"""Broken and hostile checkpoints: each a clear error before any tensor is read, nothing executed, memory bounded.

All of them are opened by one child process under a limit of memory.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Reference

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MEMORY = 256 << 20  # bytes that opening all of them may add
SECONDS = 60
Break = Callable[[Path], object]

CHILD = """
import json, resource, sys, warnings
import octavo.runtime.worker, octavo_native_cpu.attention
from octavo.checkpoints.safetensors_reader import SafetensorsReader
from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.start import start_engine

def used():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmData"].split()[0]) << 10

read, names = SafetensorsReader.read, []
SafetensorsReader.read = lambda self, name: names.append(name) or read(self, name)
resource.setrlimit(resource.RLIMIT_DATA, (used() + int(sys.argv[1]),) * 2)
for directory in sys.argv[2:]:
    names.clear()
    try:
        config = EngineConfig(model=directory, dtype="float32", max_model_len=64, max_num_seqs=4,
                              num_threads=1, plugins=(), progress=False, kv_cache_memory_bytes=1 << 20)
        start_engine(config)
        result = ["started", ""]
    except OctavoError as error:
        result = ["refused", f"{type(error).__name__}: {error}"]
    except BaseException as error:
        result = ["failed", f"{type(error).__name__}: {error}"]
    print(json.dumps([*result, len(names)]), flush=True)
"""


class Evil:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def write(directory: Path, header: bytes, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file, whatever it says."""
    size = len(header) if length is None else length
    (directory / WEIGHTS).write_bytes(size.to_bytes(8, "little") + header + data)


def headed(data: int, **entries: Any) -> Break:
    """A file with these entries (dtype, shape, begin, end) and so many bytes of data."""
    header = {n: {"dtype": d, "shape": s, "data_offsets": [b, e]} for n, (d, s, b, e) in entries.items()}
    return lambda directory: write(directory, json.dumps(header).encode(), bytes(data))


def sparse(path: Path, size: int, begin: bytes = b"") -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(begin)
    os.truncate(path, size)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def apply(directory: Path) -> None:
        loaded = load_file(directory / WEIGHTS)
        change(loaded)
        save_file(loaded, directory / WEIGHTS)

    return apply


def config(**changes: Any) -> Break:
    """Other entries in config.json; None removes one."""

    def apply(directory: Path) -> None:
        path = directory / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))

    return apply


def text(name: str, content: str) -> Break:
    return lambda directory: (directory / name).write_text(content)


def replaced(name: str, make: Callable[[Path], object]) -> Break:
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        make(directory / name)

    return apply


def shards(directory: Path) -> dict[str, str]:
    """The weights in two files, with an index; the map is returned."""
    loaded = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(loaded)}
    for file in set(places.values()):
        save_file({name: loaded[name] for name in loaded if places[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return places


def indexed(place: str) -> Break:
    """An index that puts one tensor elsewhere."""

    def apply(directory: Path) -> None:
        places = shards(directory)
        places["model.norm.weight"] = place
        (directory / INDEX).write_text(json.dumps({"weight_map": places}))

    return apply


def swapped(directory: Path) -> None:
    """An index that takes one file for the other."""
    content = json.dumps({"weight_map": shards(directory)})
    (directory / INDEX).write_text(
        content.replace("part-0", "part-2").replace("part-1", "part-0").replace("part-2", "part-1")
    )


def twice(directory: Path) -> None:
    shards(directory)
    (directory / INDEX).unlink()
    save_file({"model.norm.weight": torch.ones(64)}, directory / "part-2.safetensors")


def shard_loop(directory: Path) -> None:
    shards(directory)
    (directory / "part-0.safetensors").unlink()
    (directory / "part-0.safetensors").symlink_to("part-0.safetensors")


def pickled(name: str) -> Break:
    def apply(directory: Path) -> None:
        (directory / WEIGHTS).unlink()
        (directory / name).write_bytes(pickle.dumps(Evil(directory / "executed")))

    return apply


def remote_code(directory: Path) -> None:
    (directory / "evil.py").write_text(f"open({str(directory / 'executed')!r}, 'w')")
    config(architectures=["EvilForCausalLM"], auto_map={"AutoModelForCausalLM": "evil.Evil"})(directory)


Tensors = dict[str, torch.Tensor]


def in_fp8(name: str, weight: torch.Tensor) -> Tensors:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale": torch.ones(1)}


def in_words(name: str, weight: torch.Tensor) -> Tensors:
    """What GPTQ has of a layer, which is also what AWQ has of one of as many inputs as outputs."""
    out, width = weight.shape
    codes = {"qweight": torch.zeros(width // 8, out, dtype=torch.int32)}
    groups = {"qzeros": torch.zeros(width // 32, out // 8, dtype=torch.int32), "scales": torch.ones(width // 32, out)}
    return {f"{name}.{suffix}": tensor for suffix, tensor in (codes | groups).items()}


def quantized(
    method: str,
    store: Callable[[str, torch.Tensor], Tensors],
    change: Callable[[Tensors], object] = lambda tensors: None,
    **settings: Any,
) -> Break:
    """Every linear layer stored otherwise, then a change of the tensors, under these settings."""

    def apply(directory: Path) -> None:
        loaded = load_file(directory / WEIGHTS)
        for name in [name for name in loaded if name.endswith("_proj.weight")]:
            loaded |= store(name.removesuffix(".weight"), loaded.pop(name))
        change(loaded)
        save_file(loaded, directory / WEIGHTS)
        config(quantization_config={"quant_method": method, **settings})(directory)

    return apply


def without(suffix: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{DOWN}.{suffix}")


def recast(suffix: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{DOWN}.{suffix}": tensors[f"{DOWN}.{suffix}"].to(dtype)})


DOWN = "model.layers.1.mlp.down_proj"
NORM = "model.layers.1.mlp.down_proj.weight"
UNSOUND = r"model\.safetensors cannot be read as a safetensors file.*fetch it again"
BROKEN: dict[str, tuple[Break, str]] = {
    "truncated": (lambda d: os.truncate(d / WEIGHTS, (d / WEIGHTS).stat().st_size // 2), UNSOUND),
    "one byte short": (lambda d: os.truncate(d / WEIGHTS, (d / WEIGHTS).stat().st_size - 1), UNSOUND),
    "empty": (lambda d: os.truncate(d / WEIGHTS, 0), UNSOUND),
    "header beyond the end": (lambda d: write(d, b"{}", length=1 << 40), UNSOUND),
    "header of 200 MB": (lambda d: sparse(d / WEIGHTS, 300 << 20, (200 << 20).to_bytes(8, "little")), UNSOUND),
    "header is no JSON": (lambda d: write(d, b"not JSON"), UNSOUND),
    "header is deep": (lambda d: write(d, b'{"x":' * 100_000 + b"1" + b"}" * 100_000), UNSOUND),
    "enormous shape": (headed(0, x=("F32", [1 << 60], 0, 1 << 62)), UNSOUND),
    "shape overflows": (headed(16, x=("F32", [1 << 40, 1 << 40], 0, 16)), UNSOUND),
    "offsets overlap": (headed(16, x=("F32", [4], 0, 16), y=("F32", [4], 0, 16)), UNSOUND),
    "offsets leave a gap": (headed(32, x=("F32", [4], 16, 32)), UNSOUND),
    "offsets past the end": (headed(16, x=("F32", [8], 0, 32)), UNSOUND),
    "offsets backwards": (headed(16, x=("F32", [4], 16, 0)), UNSOUND),
    "offsets contradict the shape": (headed(16, x=("F32", [3], 0, 16)), UNSOUND),
    "name twice in a header": (
        lambda d: write(d, b"{%s,%s}" % ((b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',) * 2), bytes(4)),
        r"safetensors file|no tensor",
    ),
    "unread dtype": (headed(8, x=("U64", [1], 0, 8)), "'x' has the dtype U64, which is not read"),
    "pickle": (pickled("pytorch_model.bin"), r"pickle files only \(pytorch_model.bin\)"),
    "pickle under another name": (pickled(WEIGHTS), UNSOUND),
    "code in the directory": (remote_code, "EvilForCausalLM"),
    "wrong dtype": (tensors(lambda t: t.update({NORM: t[NORM].int()})), f"'{NORM}' is int32, but its format stores"),
    "missing tensor": (tensors(lambda t: t.pop(NORM)), f"no tensor '{NORM}', which the model needs"),
    "wrong shape": (tensors(lambda t: t.update({NORM: t[NORM][:, :1].clone()})), f"'{NORM}' has shape"),
    "index leaves the directory": (indexed("../part-0.safetensors"), "in the same directory"),
    "index with an absolute path": (indexed("/etc/passwd"), "in the same directory"),
    "index names a missing shard": (indexed("part-2.safetensors"), "part-2.safetensors is missing"),
    "index contradicts a shard": (swapped, "does not hold the tensor"),
    "index is deep": (lambda d: (shards(d), text(INDEX, "[" * 100_000)(d)), "cannot be read as JSON"),
    "shard is a loop": (shard_loop, "part-0.safetensors is missing"),
    "tensor in two files": (twice, "holds the tensor 'model.norm.weight' twice"),
    "config is no JSON": (text("config.json", "{"), "config.json cannot be read as JSON"),
    "config is deep": (text("config.json", "[" * 100_000), "config.json cannot be read as JSON"),
    "config is a list": (text("config.json", "[]"), "must hold a JSON object"),
    "config of a GB": (replaced("config.json", lambda path: sparse(path, 1 << 30)), "config.json has 1073741824 bytes"),
    "config is a device": (
        replaced("config.json", lambda path: path.symlink_to("/dev/zero")),
        "config.json is no file",
    ),
    "config is a pipe": (replaced("config.json", os.mkfifo), "config.json is no file"),
    "weights are a pipe": (replaced(WEIGHTS, os.mkfifo), r"holds no \.safetensors file"),
    "config is a loop": (replaced("config.json", lambda path: path.symlink_to("config.json")), "config.json"),
    "size is a text": (config(hidden_size="64"), "hidden_size .*'64'"),
    "size is a fraction": (config(intermediate_size=96.5), "intermediate_size .*96.5"),
    "size is negative": (config(vocab_size=-1), "vocab_size .*-1"),
    "no heads": (config(num_attention_heads=0, head_dim=None), "num_attention_heads .*0"),
    "heads do not divide": (config(num_key_value_heads=3), "num_key_value_heads"),
    "10^12 layers": (config(num_hidden_layers=10**12), "num_hidden_layers .*1000000000000"),
    "10^12 layers of Mistral": (
        config(num_hidden_layers=10**12, architectures=["MistralForCausalLM"]),
        "num_hidden_layers .*1000000000000",
    ),
    "10^6 layers": (config(num_hidden_layers=10**6), "num_hidden_layers|no tensor"),
    "10^15 positions": (config(max_position_embeddings=10**15), "max_position_embeddings .*1000000000000000"),
    "enormous vocabulary": (config(vocab_size=2**31 - 1), "'model.embed_tokens.weight' has shape"),
    "epsilon is no number": (config(rms_norm_eps=float("nan")), "rms_norm_eps .*nan"),
    "rotary base is a text": (config(rope_parameters={"rope_type": "default", "rope_theta": "x"}), "rope_theta .*'x'"),
    "rotary scaling without factor": (config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}), "factor"),
    "rotary scaling is a list": (config(rope_parameters=[1]), "rope_parameters"),
    "architectures is a number": (config(architectures=3), "architecture is 3"),
    "unknown quantization": (config(quantization_config={"quant_method": "magic"}), "quant_method is 'magic'"),
    "quantization is a text": (config(quantization_config="awq"), "quant_method is 'awq'"),
    "fp8 without a scale": (quantized("fp8", in_fp8, without("weight_scale")), f"no tensor '{DOWN}.weight_scale"),
    "fp8 with a scale too many": (
        quantized("fp8", in_fp8, lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(2)})),
        rf"'{DOWN}.weight_scale' has shape \[2\]",
    ),
    "fp8 with integer codes": (quantized("fp8", in_fp8, recast("weight", torch.int8)), f"'{DOWN}.weight' is int8"),
    "fp8 with an integer scale": (
        quantized("fp8", in_fp8, recast("weight_scale", torch.int32)),
        f"'{DOWN}.weight_scale' is int32",
    ),
    "fp8 without its input's scale": (
        quantized("fp8", in_fp8, activation_scheme="static"),
        "no tensor 'model.layers.0.self_attn.q_proj.input_scale'",
    ),
    "fp8 of a block of text": (quantized("fp8", in_fp8, weight_block_size="128"), "weight_block_size is '128'"),
    "GPTQ without scales": (
        quantized("gptq", in_words, without("scales"), bits=4, group_size=32),
        f"no tensor '{DOWN}.scales'",
    ),
    "GPTQ in wide words": (
        quantized("gptq", in_words, recast("qweight", torch.int64), bits=4, group_size=32),
        f"'{DOWN}.qweight' is int64",
    ),
    "GPTQ of 5 bits": (quantized("gptq", in_words, bits=5, group_size=32), "5 bits"),
    "GPTQ of other bits than its words": (quantized("gptq", in_words, bits=8, group_size=32), "qweight' has shape"),
    "GPTQ of other groups than its scales": (quantized("gptq", in_words, bits=4, group_size=16), "qzeros' has shape"),
    "GPTQ in another order": (
        quantized("gptq", in_words, bits=4, group_size=32, checkpoint_format="marlin"),
        "'marlin'",
    ),
    "AWQ whose groups do not divide": (quantized("awq", in_words, bits=4, group_size=48), "48"),
    "AWQ of 3 bits": (quantized("awq", in_words, bits=3, group_size=32), "3 bits"),
    "AWQ laid out as GPTQ": (quantized("awq", in_words, bits=4, group_size=32), "qweight' has shape"),
    "compressed-tensors without weights": (
        quantized("compressed-tensors", in_fp8, config_groups={"group_0": {"targets": ["Linear"]}}),
        "q_proj is stored quantized, but .* leave it dense",
    ),
    "compressed-tensors of an unknown format": (
        quantized(
            "compressed-tensors",
            in_fp8,
            format="magic",
            config_groups={"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
        ),
        "'magic'",
    ),
}


@pytest.fixture(scope="module")
def outcomes(llama: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, str, int]]:
    """What became of each: its directory, refused or not, the message, and how many tensors were read."""
    root = tmp_path_factory.mktemp("broken")
    directories = []
    for number, (spoil, _) in enumerate(BROKEN.values()):
        directories.append(copytree(llama.path, root / str(number)))
        spoil(directories[-1])
    command = [sys.executable, "-c", CHILD, str(MEMORY), *map(str, directories)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(lines) == len(BROKEN), f"ended at {list(BROKEN)[len(lines)]}: {ran.stderr}"
    return {name: (path, *line) for name, path, line in zip(BROKEN, directories, lines, strict=True)}


@pytest.mark.parametrize("name", BROKEN)
def test_refused_before_any_tensor_is_read(name: str, outcomes: dict[str, tuple[Path, str, str, int]]) -> None:
    directory, outcome, message, num_read = outcomes[name]
    assert (outcome, num_read) == ("refused", 0), message
    assert re.search(BROKEN[name][1], message), message
    assert message.startswith(("CheckpointError: ", "UnservedError: ")) and len(message) < 1500
    assert not (directory / "executed").exists()


def test_the_child_starts_what_is_sound(llama: Reference) -> None:
    """Else the others would prove nothing."""
    command = [sys.executable, "-c", CHILD, str(MEMORY), str(llama.path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    outcome, message, num_read = json.loads(ran.stdout)
    assert (outcome, message) == ("started", "") and num_read > 10
