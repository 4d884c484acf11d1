"""Which matmul computes with which layer's weight; a weight that none can serve is dequantized once, in the open."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from octavo.device import DeviceInfo
from octavo.errors import UnservedError
from octavo.plugins.registry import LoadedProvider
from octavo.plugins.selection import Selection
from octavo.weights.canonical import Dense, tensor_bytes
from octavo.weights.interface import Matmul, MatmulSpec, Weight

Choose = Callable[..., Selection]


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """Layers that are computed together: their weight, the matmul, and bytes as stored and as they lie in memory.

    `fallback` says why they were dequantized; None where they were not.
    """

    layers: tuple[str, ...]
    weight: str
    matmul: str
    stored_bytes: int
    resident_bytes: int
    fallback: str | None

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self) | {"layers": list(self.layers)}


class Placement:
    """Chooses matmuls, each once for a type, shape and features of weights, and keeps a list of what was placed.

    `choose(spec, reason)` selects a provider; under `strict` nothing is dequantized.
    """

    def __init__(self, choose: Choose, dtype: torch.dtype, device: DeviceInfo, strict: bool) -> None:
        self._choose = choose
        self._dtype = dtype
        self._device = device
        self._strict = strict
        self._chosen: dict[Any, tuple[Matmul, Selection] | UnservedError] = {}
        self.layers: list[PlacedLayer] = []

    def matmul(self, weight: type, shape: tuple[int, int], features: Any) -> tuple[Matmul, Selection]:
        """The matmul for such weights [out, in], selected at the first call. Raises PluginError."""
        key = (weight, shape, tuple(sorted(features.items())))
        if key not in self._chosen:
            self._chosen[key] = self._select(weight, shape, features)
        found = self._chosen[key]
        if isinstance(found, UnservedError):
            raise found
        return found

    def _select(self, weight: type, shape: tuple[int, int], features: Any) -> tuple[Matmul, Selection] | UnservedError:
        spec = MatmulSpec(
            weight=weight,
            in_features=shape[1],
            out_features=shape[0],
            dtype=self._dtype,
            device=self._device,
            features=features,
        )
        try:
            selection = self._choose(spec, _handles(spec))
        except UnservedError as error:
            return error
        return selection.cls(selection.options), selection

    def served(self, name: str, weight: Weight) -> tuple[Weight, str | None]:
        """The weight, or where no matmul serves it its dense value and the reason. Raises PluginError under strict."""
        try:
            self.matmul(type(weight), weight.shape, weight.features)
        except UnservedError as error:
            if isinstance(weight, Dense):
                raise
            if self._strict:
                raise UnservedError(f"{name} would be dequantized, which --strict-backends refuses: {error}") from error
            return Dense(weight.dequantize().to(self._dtype)), str(error)
        return weight, None

    def place(
        self, names: Sequence[str], weight: Weight, stored_bytes: int, origin: str, fallback: str | None
    ) -> tuple[Matmul, Any]:
        """The matmul with the weight in its layout. `origin` describes the weight as the checkpoint has it."""
        matmul, selection = self.matmul(type(weight), weight.shape, weight.features)
        packed = matmul.pack(weight)
        self.layers.append(
            PlacedLayer(tuple(names), origin, selection.chosen.name, stored_bytes, tensor_bytes(packed), fallback)
        )
        return matmul, packed


def _handles(spec: MatmulSpec) -> Callable[[LoadedProvider, Any, Any], str | None]:
    def reason(provider: LoadedProvider, cls: Any, options: Any) -> str | None:
        if spec.weight in cls.handles:
            return None
        return f"it multiplies {', '.join(one.__name__ for one in cls.handles)} weights, not {spec.weight.__name__}"

    return reason
