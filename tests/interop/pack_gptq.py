"""Run by a throw-away interpreter: quantizes and packs random layers with AutoGPTQ's own code.

Arguments: folder, seed, rounds.
"""

import importlib.util
import itertools
import random
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from packed_layers import random_linear, save_layer

BITS = (2, 3, 4, 8)


def bypass_package() -> None:
    """Make auto_gptq's modules importable without its __init__, which needs transformers 4 and peft of its time."""
    spec = importlib.util.find_spec("auto_gptq")
    assert spec is not None, "auto_gptq is installed here"
    sys.modules["auto_gptq"] = importlib.util.module_from_spec(spec)
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]  # the solver waits for a GPU


def quantize(linear: torch.nn.Linear, settings: dict[str, Any], generator: torch.Generator) -> Any:
    """Scales, zero points and group of each input by GPTQ, on inputs of unequal size; the weight is changed too."""
    solver = import_module("auto_gptq.quantization.gptq").GPTQ(linear)
    sizes = torch.rand(linear.in_features, generator=generator) + 0.1
    inputs = torch.randn(2 * linear.in_features, linear.in_features, generator=generator) * sizes
    solver.add_batch(inputs, None)
    solver.quantizer.configure(settings["bits"], perchannel=True, sym=settings["sym"], mse=False)
    return solver.fasterquant(
        group_size=settings["group_size"],
        actorder=settings["desc_act"],
        static_groups=settings["static_groups"],
    )


def pack(folder: Path, settings: dict[str, Any], in_features: int, out_features: int, seed: int) -> bool:
    """One layer, packed by the class that AutoGPTQ takes for such settings, and read back by its forward.

    False, with nothing written, for a layer with a zero point of 0, which AutoGPTQ cannot store: it fills the word.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = random_linear(in_features, out_features, bool(seed % 2), generator)
    scales, zeros, group_of = quantize(linear, settings, generator)
    if zeros.min() < 1:
        return False
    any_order = settings["desc_act"] and settings["group_size"] != -1
    module = import_module(f"auto_gptq.nn_modules.qlinear.qlinear_{'cuda' if any_order else 'cuda_old'}")
    sizes = (settings["bits"], settings["group_size"], in_features, out_features)
    layer = module.QuantLinear(*sizes, linear.bias is not None, weight_dtype=torch.float16)
    layer.pack(linear, scales, zeros, group_of)
    bias, layer.bias = layer.bias, None
    weight = layer(torch.eye(in_features, dtype=torch.float16)).t()
    layer.bias = bias
    save_layer(folder, layer, {"quant_method": "gptq", "checkpoint_format": "gptq", **settings}, weight=weight)
    return True


def main(target: str, seed: str, rounds: str) -> None:
    """Every combination of bits, symmetry and order in each round, with shapes and group sizes drawn at random."""
    bypass_package()
    draw = random.Random(int(seed))
    flags = itertools.product(range(int(rounds)), BITS, (True, False), (True, False))
    for number, bits, sym, desc_act in flags:
        group_size = draw.choice((32, 64, 128, -1))
        in_features, out_features = abs(group_size) * draw.randint(1, 5), 32 * draw.randint(1, 6)
        if group_size == -1:
            in_features *= 32
        elif desc_act:
            in_features += 32 * draw.randint(0, group_size // 32 - 1)  # the last group may be short
        settings = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
        settings["static_groups"] = group_size != -1 and draw.random() < 0.3
        order = ("-act" if desc_act else "") + ("-static" if settings["static_groups"] else "")
        name = f"{number}-b{bits}-g{group_size}-{'sym' if sym else 'asym'}{order}-{out_features}x{in_features}"
        while not pack(Path(target, name), settings, in_features, out_features, draw.getrandbits(31)):
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
