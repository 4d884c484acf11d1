"""The dense twin of a quantized checkpoint, written with our formats' own `dequantize`."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from octavo.checkpoints import open_model
from octavo.config import EngineConfig
from octavo.device import current_device
from octavo.distributed.solo import Solo
from octavo.models.builder import ModelBuilder, NoPlace
from octavo.plugins.loading import load_plugins
from octavo.runtime.assembly import assemble
from octavo.weights.interface import Weight
from octavo.weights.loader import WeightLoader
from safetensors.torch import save_file


class _Recorder(NoPlace):
    """Keeps the dense value of each weight that the model asks for, by its tensor's name."""

    def __init__(self) -> None:
        self.dense: dict[str, torch.Tensor] = {}

    def served(self, name: str, weight: Weight) -> tuple[Weight, str | None]:
        self.dense[f"{name}.weight"] = weight.dequantize()
        return weight, None


def write_dequantized(source: Path, target: Path) -> None:
    """Write the checkpoint in `source` as a dense one in float32. `target` is made."""
    config = EngineConfig.from_kwargs(model=str(source), dtype="float32", device="cpu", progress=False)
    plugins = load_plugins()
    reader = open_model(config, plugins).reader
    assembly = assemble(config, plugins, reader.config, current_device("cpu"))
    recorder = _Recorder()
    loader = WeightLoader(reader, torch.float32, torch.device("cpu"))
    unused: Any = None  # nothing is computed
    build = ModelBuilder(loader, assembly.weight_format, unused, Solo(), recorder, lambda index, norms: unused)
    assembly.model_class(assembly.model, build)
    layers = {name.removesuffix(".weight") for name in recorder.dense}
    vectors = [name for name in reader.tensors() if _is_vector(name, layers)]
    rest = {name: reader.read(name).float() for name in vectors}
    target.mkdir()
    save_file(rest | recorder.dense, target / "model.safetensors", metadata={"format": "pt"})
    dense = {key: value for key, value in reader.config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps(dense | {"dtype": "float32"}), encoding="utf-8")
    for file in [*source.glob("*token*"), *source.glob("*.jinja"), *source.glob("generation_config.json")]:
        shutil.copy(file, target)


def _is_vector(name: str, layers: set[str]) -> bool:
    """Whether the tensor is a norm's weight or a bias, rather than what a layer or the KV cache is quantized with."""
    module, _, suffix = name.rpartition(".")
    return suffix == "bias" or (suffix == "weight" and module not in layers)
