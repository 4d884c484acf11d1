"""What GPTQ's tensors mean: the step of a packed axis, zero points of both versions, and the order of groups."""

import torch
from octavo.errors import CheckpointError
from octavo.weights.bits import pack_octets, unpack_bits
from octavo.weights.interface import LinearShape


def steps_of(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole 32-bit words, and those words."""
    return (32, bits) if 32 % bits else (32 // bits, 1)


def zero_points(words: torch.Tensor, bits: int, out_features: int, is_v1: bool) -> torch.Tensor | None:
    """Words [groups, out b / 32] as GroupedInt has them; None where all zero points are 2^(bits - 1), as `sym` says.

    Version 1 stores them less one, subtracted from whole words: a zero point of 0 borrows from its neighbours, and
    adding to the whole word modulo 2^32 alone gives it back. Codes of 3 bits lie across words and were subtracted by
    themselves (GPTQModel's convert_gptq_v1_to_v2_format).
    """
    if is_v1 and 32 % bits == 0:
        words = words + sum(1 << place for place in range(0, 32, bits))  # int32 wraps
    zeros = unpack_bits(words, bits, out_features)
    if is_v1 and 32 % bits:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return None if bool((zeros == 1 << (bits - 1)).all()) else pack_octets(zeros.t(), bits)


def group_order(
    shape: LinearShape, g_idx: torch.Tensor | None, group_size: int, num_groups: int
) -> tuple[slice, torch.Tensor | None]:
    """The layer's own among the groups that it is given, and each input's group where they are not in order.

    A g_idx that is missing or all zero says nothing, and stands for order. Of several ranks, each has either its own
    groups and the whole g_idx, or all groups and its own inputs' g_idx. Raises CheckpointError.
    """
    own = -(-shape.in_features // group_size)
    if g_idx is None or not g_idx.any():
        if num_groups != own:
            raise CheckpointError(f"{shape.name} has desc_act but no g_idx, so that ranks cannot share its inputs.")
        return slice(None), None
    low, high = int(g_idx.min()), int(g_idx.max())
    known = max(num_groups, -(-len(g_idx) // group_size))
    if low < 0 or high >= known:
        raise CheckpointError(
            f"{shape.name}.g_idx has values from {low} to {high}, but the layer has {known} groups: the checkpoint is "
            "damaged."
        )
    if torch.equal(g_idx - low, torch.arange(len(g_idx), dtype=torch.int32, device=g_idx.device) // group_size):
        return slice(low, low + own), None
    if len(g_idx) != shape.in_features:
        raise CheckpointError(
            f"{shape.name}.g_idx is in no order, though config.json says that desc_act is false: ranks cannot share "
            "such a layer's inputs."
        )
    return slice(None), g_idx.contiguous()
