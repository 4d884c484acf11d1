"""What a model's constructor asks for: layers with their weights loaded, sharded, fused and packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from octavo.distributed.interface import Communicator
from octavo.errors import UnservedError
from octavo.models.layers import AttentionLayer, Embedding, Linear, Ops
from octavo.weights.canonical import Dense
from octavo.weights.interface import LinearShape, Matmul, Weight, WeightFormat
from octavo.weights.loader import Loaded, WeightLoader
from octavo.weights.unquantized import Unquantized


class Placer(Protocol):
    """Gives layers their matmuls (octavo.runtime.placement)."""

    def served(self, name: str, weight: Weight) -> tuple[Weight, str | None]:
        """The weight, or its dense value and why: no matmul serves it. Raises PluginError."""

    def place(
        self, names: Sequence[str], weight: Weight, stored_bytes: int, origin: str, fallback: str | None
    ) -> tuple[Matmul, Any]:
        """The matmul with the weight in its layout."""


class NoPlace:
    """A placer for a model that is only checked."""

    def served(self, name: str, weight: Weight) -> tuple[Weight, str | None]:
        """The weight."""
        return weight, None

    def place(
        self, names: Sequence[str], weight: Weight, stored_bytes: int, origin: str, fallback: str | None
    ) -> tuple[Matmul, Any]:
        """Nothing that could compute."""
        return cast(Matmul, None), None


class AttentionLayers(Protocol):
    """Builds layer `index`'s attention, with norms of queries and keys where the model has them."""

    def __call__(self, index: int, norms: tuple[torch.Tensor, torch.Tensor] | None) -> AttentionLayer: ...


@dataclass(frozen=True, slots=True)
class ModelBuilder:
    """Builds the layers of one model on one rank."""

    loader: WeightLoader
    weight_format: WeightFormat
    ops: Ops
    communicator: Communicator
    placer: Placer
    attention_layer: AttentionLayers

    def column(self, parts: list[tuple[str, int]], in_features: int, bias: bool) -> Linear:
        """Layers (module name, out features) with one input, side by side; each rank has some outputs of each."""
        shapes = [LinearShape(name, in_features, out, bias) for name, out in parts]
        weights = [self._load(shape, "output") for shape in shapes]
        biases = [self.loader.load_vector(f"{s.name}.bias", s.out_features, shard=True) for s in shapes] if bias else []
        return Linear(self._place(weights), torch.cat(biases) if biases else None)

    def row(self, name: str, in_features: int, out_features: int, bias: bool) -> Linear:
        """A layer whose input is spread over the ranks; rank 0 alone adds the bias."""
        weight = self._load(LinearShape(name, in_features, out_features, bias), "input")
        vector = self.loader.load_vector(f"{name}.bias", out_features, shard=False) if bias else None
        return Linear(self._place([weight]), vector if self.communicator.rank == 0 else None, self.communicator)

    def head(self, name: str, in_features: int, out_features: int) -> Linear:
        """The logits of this rank's part of the vocabulary."""
        return Linear(self._place([self._load(LinearShape(name, in_features, out_features, False), "output")]))

    def tied_head(self, name: str, embedding: Embedding) -> Linear:
        """The logits by the embedding's own tensor; `name` is the embedding's."""
        weight = embedding.weight
        return Linear(self._place([Loaded(name, Dense(weight), weight.numel() * weight.element_size())]))

    def embedding(self, name: str, num_rows: int, width: int) -> Embedding:
        """Token embeddings, this rank's part of the vocabulary."""
        weight = self._load(LinearShape(name, width, num_rows, False), "output", dense=True).weight
        assert isinstance(weight, Dense)
        return Embedding(weight.weight, self.communicator)

    def norm(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight, the same on every rank."""
        return self.loader.load_vector(name, size, shard=False)

    def attention(self, index: int, norms: tuple[torch.Tensor, torch.Tensor] | None) -> AttentionLayer:
        """Layer `index`'s attention, with norms of queries and keys where the model has them."""
        return self.attention_layer(index, norms)

    def _load(self, shape: LinearShape, split: str, dense: bool = False) -> Loaded:
        plain = dense or self.loader.holds_dense(self.weight_format, shape)
        return self.loader.load(Unquantized() if plain else self.weight_format, shape, split)

    def _place(self, layers: list[Loaded]) -> list[tuple[Matmul, Any]]:
        """Each layer with its matmul, in the matmul's layout; side by side as one where that is exact."""
        origins = list(dict.fromkeys(str(layer.weight) for layer in layers))
        served = [self.placer.served(layer.name, layer.weight) for layer in layers]
        fallback = next((reason for _, reason in served if reason is not None), None)
        joined = _join([weight for weight, _ in served])
        if joined is not None:
            stored = sum(layer.stored_bytes for layer in layers)
            names = [layer.name for layer in layers]
            try:
                return [self.placer.place(names, joined, stored, " and ".join(origins), fallback)]
            except UnservedError:  # a kernel may serve the parts alone, such as by one scale each
                if len(layers) == 1:
                    raise
        return [
            self.placer.place([layer.name], weight, layer.stored_bytes, str(layer.weight), reason)
            for layer, (weight, reason) in zip(layers, served, strict=True)
        ]


def _join(weights: Sequence[Weight]) -> Weight | None:
    """All outputs as one weight, where the types and the weights themselves allow it."""
    first = weights[0]
    if len(weights) == 1:
        return first
    return type(first).join(weights) if all(type(one) is type(first) for one in weights) else None
