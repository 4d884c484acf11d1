"""The tiny Llama as FP8, int8 and packed checkpoints, and dense with the same values, written down independently."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import build

Tensors = dict[str, torch.Tensor]
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""A dense weight -> its tensors by suffix, and the values that they stand for."""


def spread(scales: torch.Tensor, rows: int, columns: int, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks (rows, columns), for each element."""
    n, k = torch.arange(shape[0]) // rows, torch.arange(shape[1]) // columns
    return scales[n][:, k]


def block_scales(weight: torch.Tensor, rows: int, columns: int, largest: float) -> torch.Tensor:
    """Each block's largest magnitude / `largest`; blocks at the edges are ragged."""
    return torch.stack(
        [torch.stack([part.abs().amax() for part in band.split(columns, 1)]) for band in weight.split(rows)]
    ).div(largest)


def fp8(rows: int, columns: int, suffix: str, dtype: torch.dtype = torch.float32) -> Writer:
    """FP8 with a scale for each block; 0 stands for all rows or columns."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        block = (rows or weight.shape[0], columns or weight.shape[1])
        scales = block_scales(weight, *block, 448).to(dtype)
        each = spread(scales.float(), *block, weight.shape)
        codes = (weight / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = scales.view(1) if not rows else scales
        return {"weight": codes, suffix: stored}, codes.float() * each

    return write


def int8(rows: int, dtype: torch.dtype = torch.float32) -> Writer:
    """int8 with a scale for each row, or for the tensor where `rows` is 0."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        block = (rows or weight.shape[0], weight.shape[1])
        scales = block_scales(weight, *block, 127).to(dtype)
        each = spread(scales.float(), *block, weight.shape)
        codes = (weight / each).round().clamp(-127, 127).to(torch.int8)
        return {"weight": codes, "weight_scale": scales if rows else scales.view(1)}, codes.float() * each

    return write


def words(rows: list[list[int]], bits: int) -> torch.Tensor:
    """Each row of codes as one number in base 2^bits, cut into 32-bit words."""
    width = -(-len(rows[0]) * bits // 32)
    numbers = [sum(code << bits * i for i, code in enumerate(row)) for row in rows]
    signed = [[number >> 32 * i & 0xFFFFFFFF for i in range(width)] for number in numbers]
    return torch.tensor([[word - (word >> 31 << 32) for word in row] for row in signed], dtype=torch.int32)


def packed(bits: int, group_size: int, symmetric: bool = True, ordered: bool = False) -> Writer:
    """Integers of `bits` bits with a scale, and where they are not symmetric a zero point, for each group of inputs."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        out, inputs = weight.shape
        group_of = torch.arange(inputs) // group_size
        if ordered:
            group_of = group_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        groups = [weight[:, group_of == g] for g in range(inputs // group_size)]
        low, high = (torch.stack([f(g, 1) for g in groups], 1) for f in (torch.amin, torch.amax))
        half = 1 << bits - 1
        scales = (high - low) / (2 * half - 1)
        zeros = (-low / scales).round().clamp(0, 2 * half - 1)
        if symmetric:
            scales, zeros = torch.maximum(high, -low) / (half - 0.5), torch.full_like(low, half)
        scales = scales.half()
        each, zero = scales.float()[:, group_of], zeros[:, group_of]
        codes = (weight / each + zero).round().clamp(0, 2 * half - 1)
        tensors = {
            "weight_packed": words(codes.int().tolist(), bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([out, inputs]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.int().t().tolist(), bits).t().contiguous()
        if ordered:
            tensors["weight_g_idx"] = group_of.int()
        return tensors, (codes - zero) * each

    return write


def compressed(layout: str, *weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A compressed-tensors config; a second scheme is that of the MLPs."""
    targets = [["Linear"], ["re:.*mlp.*"]]
    groups = {
        f"group_{i}": {"targets": targets[i], "weights": one, **more, "format": one.get("format")}
        for i, one in enumerate(weights)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": groups,
        "ignore": ["lm_head"],
        "version": "0.19.0",
    }


def ints(bits: int, **more: Any) -> dict[str, Any]:
    """Arguments of integer weights in groups of 32."""
    return {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, **more}


@dataclass(frozen=True)
class Compressed:
    """How a checkpoint is stored: `mlp` for the MLPs where it is another way than for the rest."""

    config: dict[str, Any]
    write: Writer
    mlp: Writer | None = None


FLOATS = {"num_bits": 8, "type": "float", "strategy": "channel"}
CASES: Mapping[str, Compressed] = {
    "fp8-block": Compressed(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 40]},
        fp8(48, 40, "weight_scale_inv"),
    ),
    "fp8-tensor": Compressed({"quant_method": "fp8"}, fp8(0, 0, "weight_scale")),
    "fbgemm-rows": Compressed({"quant_method": "fbgemm_fp8"}, fp8(1, 0, "weight_scale")),
    "ct-fp8-rows": Compressed(compressed("float-quantized", FLOATS), fp8(1, 0, "weight_scale", torch.bfloat16)),
    "ct-fp8-tensor": Compressed(
        compressed("float-quantized", FLOATS | {"strategy": "tensor"}), fp8(0, 0, "weight_scale")
    ),
    "ct-fp8-block": Compressed(
        compressed("float-quantized", FLOATS | {"strategy": "block", "block_structure": [32, 48]}),
        fp8(32, 48, "weight_scale"),
    ),
    "ct-int8-rows": Compressed(compressed("int-quantized", ints(8, strategy="channel")), int8(1, torch.bfloat16)),
    "ct-int8-tensor": Compressed(compressed("int-quantized", ints(8, strategy="tensor")), int8(0)),
    "ct-w4-sym": Compressed(compressed("pack-quantized", ints(4)), packed(4, 32)),
    "ct-w4-asym": Compressed(compressed("pack-quantized", ints(4, symmetric=False)), packed(4, 32, False)),
    "ct-w3-asym": Compressed(compressed("pack-quantized", ints(3, symmetric=False)), packed(3, 32, False)),
    "ct-w8-ordered": Compressed(
        compressed("pack-quantized", ints(8, symmetric=False, actorder="group")), packed(8, 32, False, True)
    ),
    "ct-mixed": Compressed(
        compressed(
            "mixed-precision", FLOATS | {"format": "float-quantized"}, ints(4, symmetric=False, format="pack-quantized")
        ),
        fp8(1, 0, "weight_scale"),
        packed(4, 32, False),
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two checkpoints with the same values: `quantized`, and `dense` in float32."""

    quantized: Path
    dense: Path


def write_pair(directory: Path, case: Compressed) -> Pair:
    """The tiny Llama with its linear layers, but the logits', stored as the case says."""
    model = build("llama")
    pair = Pair(directory / "quantized", directory / "dense")
    for path in (pair.quantized, pair.dense):
        model.save_pretrained(path)
    dense = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    stored = dict(dense)
    for name in [name for name in dense if name.endswith("_proj.weight")]:
        write = case.mlp if case.mlp and ".mlp." in name else case.write
        tensors, dense[name] = write(stored.pop(name))
        stored |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in tensors.items()}
    save_file(stored, pair.quantized / "model.safetensors")
    save_file(dense, pair.dense / "model.safetensors")
    config = json.loads((pair.quantized / "config.json").read_text())
    (pair.quantized / "config.json").write_text(json.dumps(config | {"quantization_config": case.config}))
    return pair
