"""A packed layer's folder, written by the packing scripts, which our side opens as it opens a checkpoint.

Throw-away interpreters import this too, so it knows nothing of octavo.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NAME = "layer"
LIBRARY = Path("library", "dense.safetensors")


def save_layer(folder: Path, layer: torch.nn.Module, config: dict[str, Any], **dense: torch.Tensor) -> None:
    """Write the packed tensors as model.safetensors, and below them what the library itself makes of them.

    `config` becomes config.json's quantization_config; of `dense`, `weight` [out, in] is the library's dense weight.
    """
    (folder / LIBRARY).parent.mkdir(parents=True)
    packed = {f"{NAME}.{name}": tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(packed, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in dense.items()}, folder / LIBRARY)
    out_features, in_features = dense["weight"].shape
    shape = {"name": NAME, "in_features": in_features, "out_features": out_features, "bias": f"{NAME}.bias" in packed}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config, "shape": shape}), encoding="utf-8")


def load_dense(folder: Path) -> dict[str, torch.Tensor]:
    """What `save_layer` was given as `dense`."""
    return load_file(folder / LIBRARY)


def random_linear(in_features: int, out_features: int, bias: bool, generator: torch.Generator) -> torch.nn.Linear:
    """A layer in float16 whose rows differ in size and in mean, so that zero points vary."""
    linear = torch.nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
        spread = torch.empty(out_features, 1).uniform_(0.01, 0.1, generator=generator)
        mean = torch.empty(out_features, 1).uniform_(-0.5, 0.5, generator=generator)
        linear.weight.add_(mean).mul_(spread)
    return linear.half().requires_grad_(False)
