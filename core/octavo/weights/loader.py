"""The one sharding loader: reads a layer's tensors, this rank's part of them, and checks them on the way."""

from collections.abc import Callable, Mapping

import torch

from octavo.checkpoints.dummy import DummyReader
from octavo.checkpoints.interface import CheckpointReader, TensorInfo
from octavo.errors import CheckpointError
from octavo.weights.interface import LinearShape, ParamSpec, Weight, WeightFormat


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

    def load(self, weight_format: WeightFormat, shape: LinearShape, split: str) -> Weight:
        """The canonical weight of a layer split along its "output" or "input" features. Raises CheckpointError."""
        params: dict[str, torch.Tensor] = {}
        for spec in weight_format.params(shape):
            name = f"{shape.name}.{spec.suffix}"
            if spec.optional and name not in self.tensors:
                continue
            tensor = self._read(name, spec.shape, spec.dtype)
            params[spec.suffix] = self._shard(name, tensor, spec, split).to(self.device)
        return weight_format.weight(params, self.dtype)

    def load_vector(self, name: str, size: int, *, shard: bool) -> torch.Tensor:
        """A bias or norm weight [size] in the model's dtype, or this rank's part of it. Raises CheckpointError."""
        tensor = self._read(name, (size,), None)
        if shard:
            spec = ParamSpec(suffix="", shape=(size,), output_axis=0)
            tensor = self._shard(name, tensor, spec, "output")
        return tensor.to(device=self.device, dtype=self.dtype, copy=True)

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
        if isinstance(self.reader, DummyReader):
            self.reader.declare({name: TensorInfo(shape, dtype or self.dtype)})
            return self.reader.read(name, self.device)
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"The checkpoint has no tensor {name!r}, which the model needs.")
        if info.shape != shape:
            raise CheckpointError(
                f"Tensor {name!r} has shape {list(info.shape)}, but config.json asks for {list(shape)}."
            )
        if dtype is not None and info.dtype != dtype:
            raise CheckpointError(f"Tensor {name!r} is {info.dtype}, but its format stores {dtype}.")
        tensor = self.reader.read(name)
        self.progress(tensor.numel() * tensor.itemsize)
        return tensor

    def _shard(self, name: str, tensor: torch.Tensor, spec: ParamSpec, split: str) -> torch.Tensor:
        axis = spec.output_axis if split == "output" else spec.input_axis
        if self.size == 1 or axis is None:
            return tensor
        length = tensor.shape[axis]
        if length % self.size:
            raise CheckpointError(
                f"Tensor {name!r} has {length} elements along axis {axis}, which {self.size} ranks cannot share evenly."
            )
        part = length // self.size
        return tensor.narrow(axis, self.rank * part, part)
