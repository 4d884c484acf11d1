"""The one sharding loader: reads a layer's tensors, this rank's part of them, and checks them on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from octavo.checkpoints.dummy import DummyReader
from octavo.checkpoints.interface import CheckpointReader, TensorInfo
from octavo.errors import CheckpointError
from octavo.weights.canonical import Dense
from octavo.weights.interface import LinearShape, ParamSpec, Weight, WeightFormat


@dataclass(frozen=True, slots=True)
class Loaded:
    """A layer's canonical weight, and the bytes of the tensors that it was made of."""

    name: str
    weight: Weight
    stored_bytes: int


class WeightLoader:
    """Reads from one checkpoint for rank `rank` of `size`, onto `device`, dense tensors in `dtype`."""

    def __init__(
        self,
        reader: CheckpointReader,
        dtype: torch.dtype,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        progress: Callable[[int], object] = lambda num_bytes: None,
    ) -> None:
        self.reader = reader
        self.dtype = dtype
        self.device = device
        self.rank = rank
        self.size = size
        self.tensors: Mapping[str, TensorInfo] = reader.tensors()
        self.progress = progress

    def holds_dense(self, weight_format: WeightFormat, shape: LinearShape) -> bool:
        """Whether the layer is left unquantized: the format skips it, or its weight is dense and not for the format."""
        info = self.tensors.get(f"{shape.name}.weight")
        if weight_format.skips(shape.name):
            if info is not None:
                return _is_dense(info.dtype)
            return not any(one.startswith(f"{shape.name}.") and not one.endswith(".bias") for one in self.tensors)
        if info is None or not _is_dense(info.dtype):
            return False
        return not _stores_dense(weight_format, shape)

    def load(self, weight_format: WeightFormat, shape: LinearShape, split: str) -> Loaded:
        """The weight of a layer split along its "output" or "input" features. Raises CheckpointError."""
        params = self._read_params(weight_format, shape, split)
        stored = sum(tensor.numel() * tensor.element_size() for tensor in params.values())
        params = {suffix: tensor.to(self.device) for suffix, tensor in params.items()}
        return Loaded(shape.name, weight_format.weight(self._part(shape, split), params, self.dtype), stored)

    def load_vector(self, name: str, size: int, *, shard: bool) -> torch.Tensor:
        """A bias or norm weight [size] in the model's dtype, or this rank's part of it. Raises CheckpointError."""
        spec = ParamSpec(suffix="", shape=(size,), output_axis=0)
        tensor = self._read(name, spec)
        if shard:
            tensor = self._shard(name, tensor, spec, "output", size)
        return tensor.to(device=self.device, dtype=self.dtype, copy=True)

    def _read_params(self, weight_format: WeightFormat, shape: LinearShape, split: str) -> dict[str, torch.Tensor]:
        """The layer's tensors by suffix, this rank's part of each, on the device that they were read to."""
        params: dict[str, torch.Tensor] = {}
        features = shape.out_features if split == "output" else shape.in_features
        for spec in weight_format.params(shape):
            names = [f"{shape.name}.{suffix}" for suffix in (spec.suffix, *spec.aliases)]
            name = next((one for one in names if one in self.tensors), names[0])
            if not spec.optional or name in self.tensors:
                params[spec.suffix] = self._shard(name, self._read(name, spec), spec, split, features)
        return params

    def _read(self, name: str, spec: ParamSpec) -> torch.Tensor:
        if isinstance(self.reader, DummyReader):
            self.reader.declare({name: TensorInfo(spec.shape, spec.dtypes[0] if spec.dtypes else self.dtype)})
            return self.reader.read(name, self.device)
        self._check(name, spec)
        tensor = self.reader.read(name)
        self.progress(tensor.numel() * tensor.itemsize)
        return tensor.reshape(()) if spec.shape == () else tensor

    def _check(self, name: str, spec: ParamSpec) -> TensorInfo:
        """Compare the header's entry with what is asked for. Raises CheckpointError."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"The checkpoint has no tensor {name!r}, which the model needs.")
        single = spec.shape == () and torch.Size(info.shape).numel() == 1
        if info.shape != spec.shape and not single:
            raise CheckpointError(
                f"Tensor {name!r} has shape {list(info.shape)}, but config.json asks for {list(spec.shape)}."
            )
        if info.dtype not in spec.dtypes if spec.dtypes else not _is_dense(info.dtype):
            wanted = ", ".join(str(one).removeprefix("torch.") for one in spec.dtypes) or "16 or more floating bits"
            raise CheckpointError(
                f"Tensor {name!r} is {str(info.dtype).removeprefix('torch.')}, but its format stores {wanted}."
            )
        return info

    def _part(self, shape: LinearShape, split: str) -> LinearShape:
        """The layer as this rank has it."""
        if split == "output":
            return replace(shape, out_features=shape.out_features // self.size)
        return replace(shape, in_features=shape.in_features // self.size)

    def _shard(self, name: str, tensor: torch.Tensor, spec: ParamSpec, split: str, features: int) -> torch.Tensor:
        """This rank's part of a tensor that goes with so many features. Raises CheckpointError."""
        is_output = split == "output"
        axis, per = (spec.output_axis, spec.per_output) if is_output else (spec.input_axis, spec.per_input)
        if self.size == 1 or axis is None:
            return tensor
        length = tensor.shape[axis]
        if features // self.size % per:
            raise CheckpointError(
                f"Tensor {name!r} goes with {features} features in steps of {per}, which {self.size} ranks cannot "
                "share evenly."
            )
        if length % self.size:
            raise CheckpointError(
                f"Tensor {name!r} has {length} elements along axis {axis}, which {self.size} ranks cannot share evenly."
            )
        part = length // self.size
        return tensor.narrow(axis, self.rank * part, part)


class HeaderCheck(WeightLoader):
    """Checks a model against the headers alone, so that what is missing or mis-shaped is told before any long work.

    Its weights are dense ones without values.
    """

    def load(self, weight_format: WeightFormat, shape: LinearShape, split: str) -> Loaded:
        """Check the layer's tensors. Raises CheckpointError."""
        self._read_params(weight_format, shape, split)
        part = self._part(shape, split)
        return Loaded(shape.name, _Unread(_hollow((part.out_features, part.in_features), self.dtype)), 0)

    def _read(self, name: str, spec: ParamSpec) -> torch.Tensor:
        info = self._check(name, spec)
        return _hollow(() if spec.shape == () else info.shape, info.dtype)


class _Unread(Dense):
    """A weight of a shape, which is never laid beside another."""

    __slots__ = ()

    @classmethod
    def join(cls, weights: Sequence[Self]) -> Self | None:
        """Never."""
        return None


def _hollow(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of any shape that takes one element; one on the device "meta" would import 150 MB of torch."""
    return torch.empty((), dtype=dtype).expand(shape)


def _stores_dense(weight_format: WeightFormat, shape: LinearShape) -> bool:
    """Whether the format's own tensor is a dense one; not for a layer that it cannot hold, which was left as it is."""
    try:
        return any(spec.suffix == "weight" and not spec.dtypes for spec in weight_format.params(shape))
    except CheckpointError:
        return False


def _is_dense(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1
