"""CPU matmuls on torch's own kernels for 4-bit and 8-bit weights: small in memory, quick for single tokens.

Both widen codes to float32 inside the product. One token costs no more than a dense product, which reads two or four
times the bytes; from some eight tokens on widening costs more than reading, so they serve only where they are named.
Torch has vectorized them for bfloat16 alone: in float32 they take up to 50 times as long as a dense product.
"""

from typing import NamedTuple

import torch
from octavo.weights.bits import unpack_bits
from octavo.weights.canonical import GroupedInt, ScaledInt8
from octavo.weights.interface import Activation, ActivationSpec, MatmulSpec

_GROUP_SIZES = (256, 128, 64, 32)
_ALIGNED = 64  # bytes: the int8 kernel loads whole vectors from where rows begin, and faults elsewhere


class PackedInt4(NamedTuple):
    """What the 4-bit kernel reads: codes as it wants them, (scale, zero) [groups, out, 2] in bfloat16."""

    codes: torch.Tensor
    group_size: int
    scales_and_zeros: torch.Tensor


class Int4Matmul:
    """GroupedInt weights of 4 bits on a CPU. Scales and minima are rounded to bfloat16."""

    handles: tuple[type, ...] = (GroupedInt,)
    layout = "torch_int4"
    input = ActivationSpec()
    features = frozenset({"bits", "group_size", "zeros", "mins"})

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Serves 4 bits in groups that the kernel's own divide, in bfloat16."""
        reason = _elsewhere("torch_int4", spec, "_weight_int4pack_mm_for_cpu")
        if reason is not None:
            return reason
        bits, group_size = spec.features.get("bits"), int(spec.features.get("group_size", 0))
        if bits != 4:
            return f"torch_int4 multiplies codes of 4 bits, not of {bits}"
        if spec.out_features % 16:
            return f"torch_int4 needs a multiple of 16 outputs, not {spec.out_features}"
        if spec.in_features % group_size or _kernel_group(group_size) is None:
            return f"torch_int4 needs whole groups of a multiple of 32, not {spec.in_features} inputs by {group_size}"
        return None

    def __init__(self, options: object = None) -> None:
        del options
        self._product = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def pack(self, weight: GroupedInt) -> PackedInt4:
        """Codes in the kernel's blocks; its value is (code - 8) * scale + zero, so zero points and minima move by 8."""
        scales = weight.scales.float()
        zeros = torch.zeros_like(scales)
        if weight.mins is not None:
            zeros = weight.mins.float() + 8 * scales
        elif weight.zeros is not None:
            zeros = (8 - weight.zero_points().float()) * scales
        group_size = _kernel_group(weight.group_size)
        assert group_size is not None, "why_not"
        pairs = torch.stack((scales, zeros), -1).transpose(0, 1)
        pairs = pairs.repeat_interleave(weight.group_size // group_size, 0)
        codes = unpack_bits(weight.codes, 4, weight.in_features).int()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return PackedInt4(packed, group_size, pairs.bfloat16().contiguous())

    def apply(
        self, x: Activation, packed: PackedInt4, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b; the product is rounded before the bias is added."""
        values = x.values.contiguous()
        result: torch.Tensor = self._product(values, packed.codes, packed.group_size, packed.scales_and_zeros)
        return _finish(result, bias, out)


class PackedInt8(NamedTuple):
    """What the 8-bit kernel reads: codes [out, in], scales [out] in bfloat16."""

    codes: torch.Tensor
    scales: torch.Tensor


class Int8Matmul:
    """ScaledInt8 weights with a scale for the tensor or each row on a CPU. Inputs stay as they are, not quantized."""

    handles: tuple[type, ...] = (ScaledInt8,)
    layout = "torch_int8"
    input = ActivationSpec()
    features = frozenset({"scales", "input_scale"})

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """Serves scales by tensor and by row, in bfloat16."""
        reason = _elsewhere("torch_int8", spec, "_weight_int8pack_mm")
        if reason is not None:
            return reason
        if spec.features.get("scales") == "block":
            return "torch_int8 has one scale a row, not blocks"
        if spec.in_features % 16:
            return f"torch_int8 needs a multiple of 16 inputs, not {spec.in_features}"
        return None

    def __init__(self, options: object = None) -> None:
        del options
        self._product = torch.ops.aten._weight_int8pack_mm.default

    def pack(self, weight: ScaledInt8) -> PackedInt8:
        """Codes as they are, where the kernel may load them; a scale for each row."""
        scales = weight.scales.float().expand(weight.shape[0], 1).flatten()
        return PackedInt8(_aligned(weight.codes), scales.bfloat16())

    def apply(
        self, x: Activation, packed: PackedInt8, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x W^T + b; the product is rounded before the bias is added."""
        result: torch.Tensor = self._product(_aligned(x.values), packed.codes, packed.scales)
        return _finish(result, bias, out)


def _elsewhere(name: str, spec: MatmulSpec, op: str) -> str | None:
    """What keeps the kernel from any weight: the device, the dtype, or a torch without it."""
    if spec.device.type != "cpu":
        return f"{name} runs on a CPU, not on {spec.device.type}"
    if spec.dtype is not torch.bfloat16:
        return f"{name} computes in bfloat16, not in {str(spec.dtype).removeprefix('torch.')}"
    if not hasattr(torch.ops.aten, op):
        return f"this torch lacks {op}"
    return None


def _kernel_group(group_size: int) -> int | None:
    """The largest of the kernel's group sizes that divides a weight's, whose groups are then cut into equal ones."""
    return next((one for one in _GROUP_SIZES if group_size % one == 0), None)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its rows one after the other, from where whole vectors can be loaded."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNED == 0 else tensor.clone()


def _finish(result: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    if bias is not None:
        result += bias
    return result if out is None else out.copy_(result)
