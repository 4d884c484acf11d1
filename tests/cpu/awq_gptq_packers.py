"""Layers quantized and packed as AWQ and GPTQ tools do, by loops of their own: nothing of it is the product's code."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Quantized:
    """`codes` [out, in], `zeros` and `scales` [out, groups], and each input's group."""

    bits: int
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray

    def dense(self) -> torch.Tensor:
        """(code - zero) * scale in float32."""
        differences = self.codes - self.zeros[:, self.group_of]
        return torch.from_numpy(differences.astype(np.float32) * self.scales[:, self.group_of].astype(np.float32))

    def dense_of_minima(self) -> torch.Tensor:
        """code * scale + minimum, the minimum rounded to float16, in float32."""
        products = self.codes.astype(np.float32) * self.scales[:, self.group_of].astype(np.float32)
        return torch.from_numpy(products + self.minima()[:, self.group_of].astype(np.float32))

    def minima(self) -> np.ndarray:
        """-zero * scale in float16."""
        return -(self.scales * self.zeros.astype(np.float16))


def quantize(weight: torch.Tensor, bits: int, group_of: Sequence[int], symmetric: bool = False) -> Quantized:
    """Each group's range in 2^bits steps, rounded to the nearest."""
    values, groups, top = weight.double().numpy(), np.asarray(group_of), (1 << bits) - 1
    scales, zeros = (np.zeros((len(values), groups.max() + 1)) for _ in range(2))
    for group in range(groups.max() + 1):
        own = values[:, groups == group]
        low, high = np.minimum(own.min(1), 0), np.maximum(own.max(1), 0)
        if symmetric:
            scales[:, group], zeros[:, group] = np.abs(own).max(1) * 2 / top, 1 << (bits - 1)
        else:
            scales[:, group] = (high - low) / top
            zeros[:, group] = np.clip(np.round(-low / scales[:, group]), 0, top)
    scales = scales.astype(np.float16)
    codes = np.clip(np.round(values / scales[:, groups]) + zeros[:, groups], 0, top)
    return Quantized(bits, codes.astype(int), zeros.astype(int), scales, groups)


def in_order(in_features: int, group_size: int) -> list[int]:
    """The group of each input where the next begins after `group_size` of them; -1: one group."""
    return [0 if group_size == -1 else k // group_size for k in range(in_features)]


def awq_gemm(layer: Quantized) -> Tensors:
    """Words of eight outputs, of which the i-th nibble holds the one at 0, 2, 4, 6, 1, 3, 5, 7."""
    return {
        "qweight": _shuffled(layer.codes.T),
        "qzeros": _shuffled(layer.zeros.T),
        "scales": torch.from_numpy(layer.scales.T.copy()),
    }


def awq_gemv(layer: Quantized, group_size: int) -> Tensors:
    """Plain words along the inputs; groups padded with zeros."""
    padded = _padded_groups(layer.zeros.shape[1], group_size)
    zeros, scales = (np.pad(each, ((0, 0), (0, padded - each.shape[1]))) for each in (layer.zeros, layer.scales))
    return {"qweight": words(layer.codes, 4), "qzeros": words(zeros, 4), "scales": torch.from_numpy(scales)}


def awq_gemv_fast(layer: Quantized, group_size: int) -> Tensors:
    """Tiles of 4 x 64, the 16-bit words of each tile's rows one after the other; groups padded with zeros."""
    out_features, in_features = layer.codes.shape
    pairs = [8 * a + 2 * b + c for b in range(4) for a in range(4) for c in range(2)]  # 0, 1, 8, 9, 16, ...
    places = [pairs[8 * eight + i] for eight in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    rows = []
    for top in range(0, out_features, 4):
        nibbles: list[int] = []
        for left in range(0, in_features, 64):
            for row in layer.codes[top : top + 4]:
                nibbles += [row[left + half + place] for half in (0, 32) for place in places]
        rows.append([sum(int(nibbles[i + j]) << (4 * j) for j in range(4)) for i in range(0, len(nibbles), 4)])
    padded = _padded_groups(layer.zeros.shape[1], group_size)
    scales, minima = (np.pad(each.T, ((0, padded - each.shape[1]), (0, 0))) for each in (layer.scales, layer.minima()))
    return {
        "qweight": torch.from_numpy(np.array(rows, dtype=np.uint16).view(np.int16)),
        "scales": torch.from_numpy(scales).contiguous(),
        "qzeros": torch.from_numpy(minima).contiguous(),
    }


def gptq(layer: Quantized, version: int) -> Tensors:
    """Bit streams down the inputs and along the outputs; version 1 has the zero points less one."""
    zeros = layer.zeros.T
    if version == 1 and layer.bits == 3:
        zeros = (zeros - 1) % 8
    qzeros = words(zeros, layer.bits)
    if version == 1 and layer.bits != 3:
        ones = sum(1 << place for place in range(0, 32, layer.bits))
        qzeros = _signed([[(word - ones) % (1 << 32) for word in row] for row in qzeros.tolist()])
    return {
        "qweight": words(layer.codes, layer.bits).t().contiguous(),
        "qzeros": qzeros,
        "scales": torch.from_numpy(layer.scales.T.copy()),
        "g_idx": torch.from_numpy(layer.group_of.astype(np.int32)),
    }


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Each row as one number, the first code lowest, cut into int32 words, the first word lowest."""
    width = -(-codes.shape[1] * bits // 32)
    numbers = [sum(int(code) << (bits * place) for place, code in enumerate(row)) for row in codes]
    return _signed([[number >> (32 * place) & 0xFFFFFFFF for place in range(width)] for number in numbers])


def _shuffled(codes: np.ndarray) -> torch.Tensor:
    eights = range(0, codes.shape[1], 8)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return _signed(
        [[sum(int(row[left + place]) << (4 * i) for i, place in enumerate(order)) for left in eights] for row in codes]
    )


def _signed(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))


def _padded_groups(groups: int, group_size: int) -> int:
    """Groups of 128 and more are padded to 8, of 64 to 16, of 32 to 32."""
    unit = 8 * {32: 4, 64: 2}.get(group_size, 1)
    return -(-groups // unit) * unit
