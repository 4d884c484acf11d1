"""Weights of integers packed into 32-bit words (pack-quantized)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from octavo.errors import CheckpointError
from octavo.weights.bits import pack_bits, pack_octets, packed_width, unpack_bits
from octavo.weights.canonical import GroupedInt
from octavo.weights.interface import LinearShape, ParamSpec

from octavo_quant_compressed_tensors.scaled import SCALES, require_whole_groups

INTS = (torch.int32,)


@dataclass(frozen=True, slots=True)
class Packed:
    """`weight_packed`: codes of `bits` bits along the inputs; `weight_scale` [out, groups], and zero points likewise.

    `group_size` None: a row is one group. `ordered` layers say in `weight_g_idx` which input has which group.
    `padded` words hold whole codes only, as compressed-tensors wrote them before 0.18; otherwise codes cross from word
    to word. Zero points are packed along the outputs.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    ordered: bool
    padded: bool

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The tensors of the layer. Raises CheckpointError where groups do not divide."""
        out, groups = shape.out_features, 1
        if self.group_size is not None:
            require_whole_groups(shape, self.group_size)
            groups = shape.in_features // self.group_size
        per_word = self._codes_per_cut
        codes = ParamSpec(
            suffix="weight_packed",
            shape=(out, self._words(shape.in_features)),
            dtypes=INTS,
            output_axis=0,
            input_axis=1,
            per_input=per_word,
        )
        spread = self.group_size is not None and not self.ordered  # else every rank needs the scales of all groups
        scales = ParamSpec(
            suffix="weight_scale",
            shape=(out, groups),
            dtypes=SCALES,
            output_axis=0,
            input_axis=1 if spread else None,
            per_input=self.group_size or 1,
        )
        size = ParamSpec(suffix="weight_shape", shape=(2,), dtypes=(torch.int64, torch.int32), optional=True)
        specs = [codes, scales, size]
        if not self.symmetric:
            zeros = replace(scales, suffix="weight_zero_point", dtypes=INTS, per_output=per_word)
            specs.append(replace(zeros, shape=(self._words(out), groups)))
        if self.ordered:
            specs.append(ParamSpec(suffix="weight_g_idx", shape=(shape.in_features,), dtypes=INTS, input_axis=0))
        return specs

    @property
    def _codes_per_cut(self) -> int:
        """Codes after which a word ends: the first place where packed codes can be cut."""
        return 32 // self.bits if self.padded or 32 % self.bits == 0 else 32

    def _words(self, num_codes: int) -> int:
        return -(-num_codes // (32 // self.bits)) if self.padded else packed_width(num_codes, self.bits)

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor]) -> GroupedInt:
        """Codes and zero points as a bit stream a row each. Raises CheckpointError for what contradicts."""
        self._check_shape(shape, params.get("weight_shape"))
        codes, zeros = params["weight_packed"], None
        if self.padded and 32 % self.bits:
            codes = pack_bits(self._unpack(codes, shape.in_features), self.bits)
        if not self.symmetric:
            zeros = pack_octets(self._unpack(params["weight_zero_point"].t(), shape.out_features).t(), self.bits)
        group_size, scales = self.group_size or shape.in_features, params["weight_scale"]
        group_of = self._group_of(shape, params["weight_g_idx"], scales.shape[1]) if self.ordered else None
        return GroupedInt(
            bits=self.bits,
            in_features=shape.in_features,
            group_size=group_size,
            codes=codes,
            scales=scales,
            zeros=zeros,
            group_of=group_of,
        )

    def _unpack(self, words: torch.Tensor, num_codes: int) -> torch.Tensor:
        """Words [.., W] -> the first codes of each row, uint8."""
        if not self.padded or 32 % self.bits == 0:
            return unpack_bits(words, self.bits, num_codes)
        shifts = torch.arange(0, 32 - self.bits + 1, self.bits, dtype=torch.int32, device=words.device)
        codes = (words.unsqueeze(-1) >> shifts).bitwise_and_((1 << self.bits) - 1)
        return codes.flatten(-2)[..., :num_codes].to(torch.uint8)

    def _group_of(self, shape: LinearShape, g_idx: torch.Tensor, num_groups: int) -> torch.Tensor | None:
        """Each input's group; None where they follow one another, which the library writes as -1."""
        if (g_idx < 0).any():
            if num_groups * (self.group_size or 0) != shape.in_features:
                raise CheckpointError(f"{shape.name}.weight_g_idx gives no groups, so its scales cannot be split.")
            return None
        if (g_idx >= num_groups).any():
            raise CheckpointError(
                f"{shape.name}.weight_g_idx names group {int(g_idx.max())}, but there are {num_groups} groups."
            )
        return g_idx

    @staticmethod
    def _check_shape(shape: LinearShape, stored: torch.Tensor | None) -> None:
        """`weight_shape` is the whole layer's, of which this may be a rank's part."""
        if stored is None:
            return
        out, inputs = stored.tolist()
        if out <= 0 or inputs <= 0 or out % shape.out_features or inputs % shape.in_features:
            raise CheckpointError(
                f"{shape.name}.weight_shape is {[out, inputs]}, but the layer is "
                f"{[shape.out_features, shape.in_features]}."
            )
