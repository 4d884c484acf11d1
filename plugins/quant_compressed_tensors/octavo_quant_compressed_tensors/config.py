"""What a compressed-tensors config.json says of layers, read and checked."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from octavo.errors import CheckpointError

from octavo_quant_compressed_tensors.packed import Packed
from octavo_quant_compressed_tensors.scaled import Scaled
from octavo_quant_compressed_tensors.targets import check_targets

METHODS = ("compressed-tensors", "compressed_tensors")
WHAT = "The compressed-tensors checkpoint"
PACKED_BITS = range(2, 9)
DENSE_WORDS_SINCE = (0, 18)
ORDERED = ("group", "dynamic", True)
"""Spellings of actorder with a g_idx; "weight" and "static" leave groups in order."""

Group = tuple[tuple[str, ...], "Packed | Scaled | None"]


def find_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization of a config.json of this format, under its present key or its old one; None of another's."""
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if isinstance(found, Mapping) and found:
            method = found.get("quant_method", METHODS[0] if key == "compression_config" else None)
            return found if method in METHODS else None
    return None


def read_groups(quantization: Mapping[str, Any]) -> tuple[Group, ...]:
    """Targets and scheme of each config group; a group without weights leaves them dense. Raises CheckpointError."""
    _refuse_more_than_quantization(quantization)
    groups = _object(quantization, "config_groups", WHAT)
    return tuple(_read_group(name, group, quantization) for name, group in groups.items())


def read_names(parent: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The targets under a key. Raises CheckpointError."""
    names = parent.get(key)
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise CheckpointError(f"{where} has {key} {names!r}, but must have a list of names there.")
    check_targets(names, f"{where} has {key}")
    return tuple(names)


def _refuse_more_than_quantization(quantization: Mapping[str, Any]) -> None:
    sparsity = _object(quantization, "sparsity_config", WHAT)
    if sparsity and sparsity.get("format") != "dense":  # zeros that are stored like any number need no care
        raise CheckpointError(
            f"{WHAT} is sparse (sparsity_config has the format {sparsity.get('format')!r}), which is not read: save "
            "the model without sparse compression."
        )
    transforms = _object(_object(quantization, "transform_config", WHAT), "config_groups", WHAT)
    if transforms:
        raise CheckpointError(
            f"{WHAT} has transforms ({', '.join(transforms)}), which are not applied: use a checkpoint without "
            "transform_config (Hadamard rotations)."
        )


def _object(parent: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The object under a key, {} where there is none. Raises CheckpointError for what is no object."""
    found = parent.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} has {key} {found!r}, but must have an object there.")
    return found


def _read_group(name: str, group: Any, quantization: Mapping[str, Any]) -> Group:
    where = f"{WHAT}'s config group {name!r}"
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{where} is {group!r}, but must be an object.")
    targets = read_names(group, "targets", where)
    weights, layout = _object(group, "weights", where), group.get("format") or quantization.get("format")
    if not weights or layout == "dense":
        return targets, None
    if layout == "pack-quantized":
        return targets, _packed(where, weights, quantization.get("version"))
    if layout in ("float-quantized", "int-quantized", "naive-quantized"):
        return targets, _scaled(where, weights, layout, _object(group, "input_activations", where))
    raise CheckpointError(
        f"{where} has the format {layout!r}, but read are pack-quantized, float-quantized, int-quantized, "
        "naive-quantized and dense."
    )


def _packed(where: str, weights: Mapping[str, Any], version: object) -> Packed:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), _strategy(weights)
    if kind != "int" or type(bits) is not int or bits not in PACKED_BITS:
        raise CheckpointError(f"{where} packs weights of {bits} bits, type {kind!r}, but read are integers of 2 to 8.")
    if strategy not in ("group", "channel"):
        raise CheckpointError(
            f"{where} packs weights with scales by {strategy}, but read are those by group or channel."
        )
    ordered = weights.get("actorder") in ORDERED
    if ordered and strategy == "channel":
        raise CheckpointError(f"{where} has an actorder by group, but scales by channel.")
    group_size = _group_size(where, weights) if strategy == "group" else None
    return Packed(bits, group_size, weights.get("symmetric", True), ordered, _is_before_dense_words(version))


def _scaled(where: str, weights: Mapping[str, Any], layout: str, inputs: Mapping[str, Any]) -> Scaled:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), _strategy(weights)
    stored = {"float-quantized": "float", "int-quantized": "int"}.get(layout, kind)
    if (kind, stored) not in (("float", "float"), ("int", "int")) or bits != 8:
        raise CheckpointError(
            f"{where} has {layout} weights of {bits} bits, type {kind!r}, but read are 8 bits of the type that the "
            "format is named after."
        )
    if not weights.get("symmetric", True):
        raise CheckpointError(f"{where} has asymmetric {layout} weights, but read are symmetric ones.")
    if weights.get("actorder") in ORDERED:
        raise CheckpointError(
            f"{where} has {layout} weights in an actorder by group, which pack-quantized ones may have."
        )
    codes = torch.int8 if kind == "int" else torch.float8_e4m3fn
    # Kernels quantize inputs symmetrically, by one static scale: any other is of no use to them.
    static = bool(inputs) and not inputs.get("dynamic") and inputs.get("symmetric", True)
    return Scaled(codes, _block(where, weights, strategy), static and _strategy(inputs) == "tensor")


def _strategy(arguments: Mapping[str, Any]) -> str:
    """The strategy, or what the library takes for it where there is none."""
    size = arguments.get("group_size")
    return arguments.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")


def _block(where: str, weights: Mapping[str, Any], strategy: str) -> tuple[int, int]:
    if strategy == "block":
        block = weights.get("block_structure")
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise CheckpointError(f"{where} has block_structure {block!r}, but must have two positive integers there.")
        return (block[0], block[1])
    if strategy == "group":
        return (1, _group_size(where, weights))
    if strategy not in ("tensor", "channel"):
        raise CheckpointError(
            f"{where} has scales of weights by {strategy}, but read are those by tensor, channel, group or block."
        )
    return (0, 0) if strategy == "tensor" else (1, 0)


def _group_size(where: str, weights: Mapping[str, Any]) -> int:
    size = weights.get("group_size")
    if type(size) is not int or size <= 0:
        raise CheckpointError(f"{where} has a group_size of {size!r}, but must have a positive integer there.")
    return size


def _is_before_dense_words(version: object) -> bool:
    """Whether the library's version wrote words without codes across their ends; older files name none."""
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return numbers is None or (int(numbers[1]), int(numbers[2])) < DENSE_WORDS_SINCE
