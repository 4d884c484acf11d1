"""Run by a throw-away interpreter: packs random layers with AutoAWQ's own code. Arguments: folder, seed, rounds."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast
from awq.quantize.quantizer import AwqQuantizer
from awq.utils.packing_utils import dequantize_gemm
from packed_layers import random_linear, save_layer

KINDS = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast}


def pack(folder: Path, version: str, group_size: int, in_features: int, out_features: int, seed: int) -> None:
    """One layer, quantized and packed as AutoAWQ's quantizer does it."""
    generator = torch.Generator().manual_seed(seed)
    linear = random_linear(in_features, out_features, bool(seed % 2), generator)
    settings = SimpleNamespace(w_bit=4, group_size=group_size, zero_point=True)
    weight, scales, zeros = AwqQuantizer.pseudo_quantize_tensor(settings, linear.weight)
    linear.weight.data = weight
    if version == "gemm":
        scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    layer = KINDS[version].from_linear(linear, 4, group_size, scales=scales, zeros=zeros)
    dense = {"weight": weight}  # what the quantizer rounded to: only CUDA kernels read gemv and gemv_fast
    if version == "gemm":
        dense["weight"] = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group_size).t()
    elif version == "gemv_fast":
        minima = layer.qzeros[: in_features // group_size].t()
        dense["minima"] = minima.repeat_interleave(group_size, 1)
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": version}
    save_layer(folder, layer, config, **dense)


def main(target: str, seed: str, rounds: str) -> None:
    """Every layout in each round, with shapes and group sizes drawn at random."""
    draw = random.Random(int(seed))
    for number in range(int(rounds)):
        for version in KINDS:
            group_size = draw.choice((32, 64, 128))
            columns = max(group_size, 64) if version == "gemv_fast" else group_size
            in_features, out_features = columns * draw.randint(1, 9), 32 * draw.randint(1, 9)
            if draw.random() < 0.2:
                group_size = in_features if in_features >= 128 else group_size
            name = f"{number}-{version}-g{group_size}-{out_features}x{in_features}"
            pack(Path(target, name), version, group_size, in_features, out_features, draw.getrandbits(31))


if __name__ == "__main__":
    main(*sys.argv[1:])
