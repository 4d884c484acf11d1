"""GPTQ checkpoints (Frantar et al. 2022) as AutoGPTQ and GPTQModel write them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from octavo.errors import CheckpointError
from octavo.weights.canonical import GroupedInt
from octavo.weights.interface import LinearShape, ParamSpec

from octavo_quant_gptq.tensors import group_order, steps_of, zero_points

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class Settings:
    """Codes of `bits` bits, a scale for `group_size` inputs (-1: all); with `desc_act` g_idx picks them anywhere."""

    bits: int
    group_size: int
    desc_act: bool


class GPTQ:
    """One checkpoint's settings, and `rules`, others (None: not quantized) for modules that match a pattern.

    Of a module's rules the first counts. `sym` is not read, since the zero points themselves tell.
    """

    def __init__(
        self,
        settings: Settings,
        rules: Mapping[re.Pattern[str], Settings | None],
        is_v1: bool,
        quantizes_head: bool,
    ) -> None:
        self.settings = settings
        self.rules = rules
        self.is_v1 = is_v1
        self.quantizes_head = quantizes_head

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """Claims quant_method gptq, and what AutoGPTQ wrote before it named one. Raises CheckpointError."""
        content = config.get("quantization_config")
        if not isinstance(content, Mapping) or not _is_gptq(content):
            return None
        settings = _settings(content, "The GPTQ checkpoint")
        return cls(settings, _rules(content), _format(content) == "gptq", content.get("lm_head") is True)

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> Self | None:
        """Never: GPTQ needs calibration data."""
        return None

    def skips(self, module: str) -> bool:
        """Modules that `dynamic` leaves out, and lm_head unless the config quantizes it."""
        if module.rpartition(".")[2] == "lm_head" and not self.quantizes_head:
            return True
        return self._of(module) is None

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """qweight [in b / 32, out], qzeros [groups, out b / 32], scales [groups, out], perhaps g_idx [in].

        With `desc_act` ranks share g_idx and each has all groups, else they share the groups. Raises CheckpointError.
        """
        settings = self._settings(shape)
        bits, (codes, words) = settings.bits, steps_of(settings.bits)
        for side, features in (("input", shape.in_features), ("output", shape.out_features)):
            if features % codes:
                raise CheckpointError(
                    f"{shape.name} has {features} {side} features, but {bits}-bit GPTQ needs a multiple of {codes}."
                )
        group_size = _group_size(settings, shape)
        groups = -(-shape.in_features // group_size)
        split = groups > 1 and not settings.desc_act
        grouped: dict[str, Any] = {"input_axis": 0 if split else None, "per_input": group_size}
        packed: dict[str, Any] = {"dtypes": (torch.int32,), "output_axis": 1}
        rows, columns = shape.in_features // codes * words, shape.out_features // codes * words
        return [
            ParamSpec(suffix="qweight", shape=(rows, shape.out_features), input_axis=0, per_input=codes, **packed),
            ParamSpec(suffix="qzeros", shape=(groups, columns), per_output=codes, **grouped | packed),
            ParamSpec(suffix="scales", shape=(groups, shape.out_features), output_axis=1, **grouped),
            ParamSpec(
                suffix="g_idx",
                shape=(shape.in_features,),
                dtypes=(torch.int32,),
                input_axis=0 if settings.desc_act else None,
                optional=True,
            ),
        ]

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> GroupedInt:
        """The canonical weight, its scales in the dtype that they are stored in. Raises CheckpointError."""
        settings = self._settings(shape)
        group_size = _group_size(settings, shape)
        present, group_of = group_order(shape, params.get("g_idx"), group_size, len(params["scales"]))
        zeros = zero_points(params["qzeros"][present], settings.bits, shape.out_features, self.is_v1)
        return GroupedInt(
            bits=settings.bits,
            in_features=shape.in_features,
            group_size=group_size,
            codes=params["qweight"].t().contiguous(),  # both are bit streams along the inputs
            scales=params["scales"][present].t().contiguous(),
            zeros=zeros,
            group_of=group_of,
        )

    def _settings(self, shape: LinearShape) -> Settings:
        return self._of(shape.name) or self.settings

    def _of(self, module: str) -> Settings | None:
        """The module's settings; None where `dynamic` leaves it out."""
        return next((own for pattern, own in self.rules.items() if pattern.match(module)), self.settings)


def _group_size(settings: Settings, shape: LinearShape) -> int:
    return shape.in_features if settings.group_size == -1 else settings.group_size


def _is_gptq(content: Mapping[str, Any]) -> bool:
    """quantize_config.json named no method; `desc_act` stands in GPTQ's alone."""
    method = content.get("quant_method")
    return method == "gptq" if method is not None else "desc_act" in content


def _format(content: Mapping[str, Any]) -> str:
    """The checkpoint's format. Raises CheckpointError for one that is laid out otherwise."""
    name = "marlin" if content.get("is_marlin_format") else content.get("checkpoint_format") or content.get("format")
    name = name or "gptq"
    if name not in FORMATS:
        raise CheckpointError(
            f"The GPTQ checkpoint has the format {name!r}, but only {' and '.join(FORMATS)} are read: save it in one "
            "of these."
        )
    words = content.get("pack_dtype") or "int32"
    if words != "int32":
        raise CheckpointError(
            f"The GPTQ checkpoint is packed into {words}, but only int32 is read: save it with pack_dtype int32."
        )
    return str(name)


def _settings(content: Mapping[str, Any], owner: str) -> Settings:
    """The settings, checked. Raises CheckpointError, in whose sentence `owner` has them."""
    bits, group_size = content.get("bits"), content.get("group_size")
    if bits not in BITS:
        raise CheckpointError(f"{owner} has {bits!r} bits, but only {', '.join(map(str, BITS))} are read.")
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"{owner} has the group size {group_size!r}, but it must be a positive number of inputs, or -1 for all of "
            "them."
        )
    return Settings(int(bits), group_size, bool(content.get("desc_act")))


def _rules(content: Mapping[str, Any]) -> dict[re.Pattern[str], Settings | None]:
    """What `dynamic` says: "-:pattern" leaves modules out, "pattern" or "+:pattern" changes their settings."""
    rules: dict[re.Pattern[str], Settings | None] = {}
    dynamic = content.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"The GPTQ checkpoint's dynamic is {dynamic!r}, but must be an object of patterns.")
    for text, changes in dynamic.items():
        try:
            pattern = re.compile(text.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(
                f"The GPTQ checkpoint's dynamic has the pattern {text!r}, which is no regular expression: {error}."
            ) from error
        owner = f"The GPTQ checkpoint's dynamic entry {text!r}"
        own = changes if isinstance(changes, Mapping) else {}
        rules[pattern] = None if text.startswith("-:") else _settings({**content, **own}, owner)
    return rules
