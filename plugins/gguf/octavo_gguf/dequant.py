"""Blocks of quantized GGUF tensors to float32, all blocks at once.

Every function takes uint8 blocks [n, bytes of a block] and returns float32 [n, values of a block]. The arithmetic is
done in float32 in the order that the format defines, so results are equal bit for bit to those of other decoders.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo_gguf.types import BlockType

CHUNK_VALUES = 1 << 22
"""Values decoded at a time: bounds the temporary memory, and keeps it in the cache."""


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """All low nibbles of a block, then all high ones."""
    return torch.cat([codes & 15, codes >> 4], dim=1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """32 bits of each block, lowest first, from 4 bytes: uint8 [n, 32] of 0 or 16."""
    bits = (packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.reshape(-1, 32) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).to(torch.int8) - 8).float() * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (codes.to(torch.int8) - 16).float() * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes.float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _sub_block_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes, each float32 [n, 8]."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales.float(), minima.float()


def _scaled_sub_blocks(blocks: Tensor, codes: Tensor) -> Tensor:
    """d * scale * code - dmin * minimum for codes [n, 8, 32]."""
    scales, minima = _sub_block_scales(blocks[:, 4:16])
    scales = (_half(blocks, 0) * scales).unsqueeze(2)
    minima = (_half(blocks, 2) * minima).unsqueeze(2)
    return (scales * codes.float() - minima).reshape(-1, 256)


def _paired_nibbles(codes: Tensor) -> Tensor:
    """Sub-block 2p from the low nibbles of 32 bytes, 2p + 1 from the high ones: uint8 [n, 8, 32]."""
    codes = codes.reshape(-1, 4, 32)
    return torch.stack([codes & 15, codes >> 4], dim=2).reshape(-1, 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled_sub_blocks(blocks, _paired_nibbles(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8).reshape(8, 1)
    fifth = ((blocks[:, 16:48].unsqueeze(1) >> shifts) & 1) << 4
    return _scaled_sub_blocks(blocks, _paired_nibbles(blocks[:, 48:]) | fifth)


def _q6_k(blocks: Tensor) -> Tensor:
    low = blocks[:, :128].reshape(-1, 2, 1, 2, 32)
    low = torch.cat([low & 15, low >> 4], dim=2).reshape(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).reshape(4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).to(torch.int8) - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scales.unsqueeze(2) * codes.reshape(-1, 16, 16).float()).reshape(-1, 256)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are stored as torch has them."""


def output_dtype(block: BlockType) -> torch.dtype:
    """The dtype that `dequantize` gives: the stored one, and float32 for quantized types."""
    return PLAIN.get(block.name, torch.float32)


def dequantize(rows: Tensor, block: BlockType) -> Tensor:
    """Decode uint8 rows [rows, bytes of a row] to [rows, values of a row]; plain types are viewed, not copied."""
    if not block.quantized:
        return rows.view(PLAIN[block.name])
    decode = DECODERS[block.name]
    blocks = rows.reshape(-1, block.size)
    out = torch.empty(len(blocks), block.values)
    step = CHUNK_VALUES // block.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = decode(blocks[start : start + step])
    return out.reshape(len(rows), -1)
