"""How AutoAWQ's three versions lay a layer's 4-bit codes, zero points and scales, and the way back.

All three are W[n, k] = (code - zero) * scale of group k // group_size; gemv_fast stores -zero * scale instead of zeros.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from octavo.errors import CheckpointError
from octavo.weights.bits import pack_bits, pack_octets, unpack_bits
from octavo.weights.canonical import GroupedInt
from octavo.weights.interface import LinearShape, ParamSpec

BITS = 4
CODES_PER_WORD = 32 // BITS
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""In gemm's words, the nibble of each of eight neighbouring outputs."""

Params = Mapping[str, torch.Tensor]


class Layout(Protocol):
    """A version: the tensors of a layer, and its weight. `group_size` is a number of inputs, never -1."""

    @staticmethod
    def params(shape: LinearShape, group_size: int) -> list[ParamSpec]:
        """The stored tensors. Raises CheckpointError for a layer that the version cannot hold."""

    @staticmethod
    def weight(shape: LinearShape, group_size: int, params: Params) -> GroupedInt:
        """The canonical weight."""


class Gemm:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]: words of eight outputs, shuffled."""

    @staticmethod
    def params(shape: LinearShape, group_size: int) -> list[ParamSpec]:
        """The stored tensors. Raises CheckpointError."""
        _check_multiple(shape, "input", shape.in_features, group_size, "groups")
        _check_multiple(shape, "output", shape.out_features, CODES_PER_WORD, "gemm's words")
        groups, width = _num_groups(shape, group_size), shape.out_features // CODES_PER_WORD
        grouped: dict[str, Any] = {"input_axis": _split_axis(0, groups), "per_input": group_size, "output_axis": 1}
        words: dict[str, Any] = {"dtypes": (torch.int32,), "output_axis": 1, "per_output": CODES_PER_WORD}
        return [
            ParamSpec(suffix="qweight", shape=(shape.in_features, width), input_axis=0, **words),
            ParamSpec(suffix="qzeros", shape=(groups, width), **grouped | words),
            ParamSpec(suffix="scales", shape=(groups, shape.out_features), **grouped),
        ]

    @staticmethod
    def weight(shape: LinearShape, group_size: int, params: Params) -> GroupedInt:
        """Codes and zero points put in order, along the inputs."""
        return GroupedInt(
            bits=BITS,
            in_features=shape.in_features,
            group_size=group_size,
            codes=pack_bits(_in_order(params["qweight"]), BITS),
            scales=params["scales"].t().contiguous(),
            zeros=pack_octets(_in_order(params["qzeros"]), BITS),
        )


class Gemv:
    """qweight [out, in / 8], qzeros [out, Z], scales [out, 8 Z]: plain order along the inputs, groups padded."""

    @staticmethod
    def params(shape: LinearShape, group_size: int) -> list[ParamSpec]:
        """The stored tensors. Raises CheckpointError."""
        _check_multiple(shape, "input", shape.in_features, group_size, "groups")
        _check_multiple(shape, "input", shape.in_features, CODES_PER_WORD, "gemv's words")
        width = _padded_words(shape, group_size)
        grouped = _padded_axes(shape, group_size, width, input_axis=1)
        words: dict[str, Any] = {"dtypes": (torch.int32,), "output_axis": 0}
        rows = shape.out_features
        return [
            ParamSpec(
                suffix="qweight",
                shape=(rows, shape.in_features // CODES_PER_WORD),
                input_axis=1,
                per_input=CODES_PER_WORD,
                **words,
            ),
            ParamSpec(suffix="qzeros", shape=(rows, width), **grouped | words),
            ParamSpec(suffix="scales", shape=(rows, CODES_PER_WORD * width), **grouped),
        ]

    @staticmethod
    def weight(shape: LinearShape, group_size: int, params: Params) -> GroupedInt:
        """The codes as they are, zero points and scales without what pads them."""
        groups = _num_groups(shape, group_size)
        return GroupedInt(
            bits=BITS,
            in_features=shape.in_features,
            group_size=group_size,
            codes=params["qweight"].contiguous(),
            scales=params["scales"][:, :groups].contiguous(),
            zeros=pack_octets(unpack_bits(params["qzeros"], BITS, groups), BITS),
        )


class GemvFast:
    """qweight int16 [out / 4, in] in tiles of 4 outputs by 64 inputs; scales and qzeros [8 Z, out], groups padded."""

    TILE = (4, 64)

    @staticmethod
    def params(shape: LinearShape, group_size: int) -> list[ParamSpec]:
        """The stored tensors. Raises CheckpointError."""
        rows, columns = GemvFast.TILE
        _check_multiple(shape, "input", shape.in_features, group_size, "groups")
        _check_multiple(shape, "input", shape.in_features, columns, "gemv_fast's tiles")
        _check_multiple(shape, "output", shape.out_features, rows, "gemv_fast's tiles")
        width = _padded_words(shape, group_size)
        grouped = _padded_axes(shape, group_size, width, input_axis=0)
        table = (CODES_PER_WORD * width, shape.out_features)
        codes = ParamSpec(
            suffix="qweight",
            shape=(shape.out_features // rows, shape.in_features),
            dtypes=(torch.int16,),
            input_axis=1,
            per_input=columns,
            output_axis=0,
            per_output=rows,
        )
        return [codes, *(ParamSpec(suffix=name, shape=table, **grouped) for name in ("scales", "qzeros"))]

    @staticmethod
    def weight(shape: LinearShape, group_size: int, params: Params) -> GroupedInt:
        """Codes put in order; scales and minima without what pads them."""
        groups = _num_groups(shape, group_size)
        return GroupedInt(
            bits=BITS,
            in_features=shape.in_features,
            group_size=group_size,
            codes=pack_bits(_untiled(params["qweight"]), BITS),
            scales=params["scales"][:groups].t().contiguous(),
            mins=params["qzeros"][:groups].t().contiguous(),
        )


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """gemm's words [rows, out / 8] -> codes [out, rows]."""
    nibbles = unpack_bits(words, BITS, words.shape[1] * CODES_PER_WORD)
    return nibbles.view(len(words), -1, CODES_PER_WORD)[..., NIBBLES].flatten(1).t()


def _untiled(words: torch.Tensor) -> torch.Tensor:
    """gemv_fast's words [out / 4, in] -> codes [out, in].

    A tile's four rows lie one after the other. In each 32 inputs, input 8 a + 2 b + c is at place 8 b + 4 c + a.
    """
    rows, columns = GemvFast.TILE
    bands, in_features = words.shape
    nibbles = unpack_bits(words.contiguous().view(torch.int32), BITS, rows * in_features)
    tiles = nibbles.view(bands, in_features // columns, rows, columns // 32, 4, 2, 4)
    return tiles.permute(0, 2, 1, 3, 6, 4, 5).reshape(rows * bands, in_features)


def _padded_words(shape: LinearShape, group_size: int) -> int:
    """Words of eight groups that gemv and gemv_fast keep for a row: a multiple that depends on the group size."""
    multiple = 1 if group_size >= 128 else {64: 2, 32: 4}.get(group_size)
    if multiple is None:
        raise CheckpointError(
            f"{shape.name} has groups of {group_size} inputs, but AWQ's gemv versions store groups of 32, 64, or 128 "
            "and more."
        )
    groups = _num_groups(shape, group_size)
    return -(-groups // (CODES_PER_WORD * multiple)) * multiple


def _padded_axes(shape: LinearShape, group_size: int, width: int, input_axis: int) -> dict[str, Any]:
    """The axes of a table of padded groups: ranks can part it at whole words, and not at all where there is padding."""
    padded = width * CODES_PER_WORD * group_size != shape.in_features
    unit = shape.in_features if padded else CODES_PER_WORD * group_size
    axis = _split_axis(input_axis, _num_groups(shape, group_size))
    return {"input_axis": axis, "per_input": unit, "output_axis": 1 - input_axis}


def _num_groups(shape: LinearShape, group_size: int) -> int:
    """Groups of a layer, or of a rank's part of it, which may lie inside one."""
    return -(-shape.in_features // group_size)


def _split_axis(axis: int, groups: int) -> int | None:
    """The axis of the groups; None for a single one, which every rank has."""
    return axis if groups > 1 else None


def _check_multiple(shape: LinearShape, side: str, features: int, multiple: int, what: str) -> None:
    if features % multiple:
        raise CheckpointError(
            f"{shape.name} has {features} {side} features, but {what} of this AWQ checkpoint need a multiple of "
            f"{multiple}."
        )
