"""Weight formats say how a checkpoint stores a layer; matmuls say how a kernel computes with it.

Between them stand the canonical weights, so that formats and kernels do not multiply.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import torch

from octavo.device import DeviceInfo

FORMAT_API = 1
MATMUL_API = 1


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer of the checkpoint, by its module name: y [.., out] = x [.., in] W^T + b."""

    name: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamSpec:
    """A stored tensor of a layer: `suffix` follows the module name, or one of `aliases` does.

    `dtypes` are those that it may have, none given: any floating one of 16 bits or more. The shape () stands for any
    shape with one element. `input_axis` / `output_axis` are the axes that follow the input / output features (None: the
    tensor does not), with `per_input` / `per_output` features in each stored element, or in the fewest that can be
    parted from the rest. `optional` tensors may be absent.
    """

    suffix: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = ()
    aliases: tuple[str, ...] = ()
    input_axis: int | None = None
    output_axis: int | None = None
    per_input: int = 1
    per_output: int = 1
    optional: bool = False


class Weight(Protocol):
    """A canonical weight (octavo.weights.canonical), or a type that a format brings together with its own matmul."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out features, in features)."""

    @property
    def features(self) -> Mapping[str, Any]:
        """What a matmul must declare to serve it, by name; absent or false means off."""

    def dequantize(self) -> torch.Tensor:
        """The dense weight [out, in] in float32: oracle, and fallback anywhere."""

    @classmethod
    def join(cls, weights: Sequence[Self]) -> Self | None:
        """Layers of one input, their outputs one after the other; None where that would not be exact."""


class WeightFormat(Protocol):
    """A checkpoint format (`--quantization`)."""

    @classmethod
    def claim(cls, config: Mapping[str, Any]) -> Self | None:
        """The format for a checkpoint with this config.json, or None if it is another format's.

        Raises CheckpointError for a checkpoint of this format that it cannot read (bits, versions).
        """

    @classmethod
    def quantize(cls, config: Mapping[str, Any]) -> "WeightFormat | None":
        """The format that quantizes an unquantized checkpoint as it is loaded, None where it cannot.

        Asked only when the configuration names it.
        """

    def skips(self, module: str) -> bool:
        """Whether the checkpoint leaves this module unquantized; where its header tells, that is believed instead."""

    def params(self, shape: LinearShape) -> list[ParamSpec]:
        """The tensors that the checkpoint holds for the layer, its bias aside.

        Raises CheckpointError for a layer that the format cannot hold, such as one whose groups do not divide.
        """

    def weight(self, shape: LinearShape, params: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Weight:
        """The canonical weight of the tensors, by suffix; dense ones in `dtype`.

        With several ranks, shape and tensors are this rank's part. Raises CheckpointError for tensors that contradict.
        """


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """How a matmul wants its input: `scheme` "dense", or a quantization that the op before it may fuse."""

    scheme: str = "dense"


class Activation(NamedTuple):
    """A matmul's input: values [T, in], with scales where the scheme has them."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulSpec:
    """What a matmul is asked to serve: weights of the type `weight`. `features` are the weight's (see Weight.features).

    The core rejects a matmul that does not handle the type or lacks a feature.
    """

    weight: type
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: DeviceInfo
    features: Mapping[str, Any] = field(default_factory=dict)


class Matmul(Protocol):
    """A kernel for a canonical weight (`--linear-backend`). Built as `Matmul(options)`."""

    handles: tuple[type, ...]
    layout: str
    input: ActivationSpec
    features: frozenset[str]

    @staticmethod
    def why_not(spec: MatmulSpec, options: object) -> str | None:
        """One sentence when the matmul cannot serve, else None."""

    def pack(self, weight: Any) -> Any:
        """The weight in the kernel's own layout; the caller drops the original."""

    def apply(
        self, x: Activation, packed: Any, bias: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, in] -> [T, out], into `out` where given: rounded once, to its dtype, which may be wider than x's."""
