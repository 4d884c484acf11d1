"""What a model's constructor asks for: layers with their weights loaded, sharded, fused and packed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.distributed.interface import Communicator
from octavo.models.layers import AttentionLayer, Embedding, Linear, Ops
from octavo.weights.interface import Dense, LinearShape, Matmul, Weight, WeightFormat
from octavo.weights.loader import WeightLoader
from octavo.weights.unquantized import Unquantized


@dataclass(frozen=True, slots=True)
class ModelBuilder:
    """Builds the layers of one model on one rank.

    `matmul(weight type, in, out)` and `attention_layer(index, norms)` give the providers that were selected.
    """

    loader: WeightLoader
    weight_format: WeightFormat
    ops: Ops
    communicator: Communicator
    matmul: Callable[[type, int, int], Matmul]
    attention_layer: Callable[[int, tuple[torch.Tensor, torch.Tensor] | None], AttentionLayer]

    def column(self, parts: list[tuple[str, int]], in_features: int, bias: bool) -> Linear:
        """Layers (module name, out features) with one input, side by side; each rank has some outputs of each."""
        shapes = [LinearShape(name, in_features, out, bias) for name, out in parts]
        weights = [self._weight(shape, "output") for shape in shapes]
        biases = [self.loader.load_vector(f"{s.name}.bias", s.out_features, shard=True) for s in shapes] if bias else []
        return Linear(self._pack(weights), torch.cat(biases) if biases else None)

    def row(self, name: str, in_features: int, out_features: int, bias: bool) -> Linear:
        """A layer whose input is spread over the ranks; rank 0 alone adds the bias."""
        weight = self._weight(LinearShape(name, in_features, out_features, bias), "input")
        vector = self.loader.load_vector(f"{name}.bias", out_features, shard=False) if bias else None
        return Linear(self._pack([weight]), vector if self.communicator.rank == 0 else None, self.communicator)

    def head(self, name: str, in_features: int, out_features: int) -> Linear:
        """The logits of this rank's part of the vocabulary; `name` is the embedding's where they are tied."""
        shape = LinearShape(name, in_features, out_features, False)
        quantized = f"{name}.weight" not in self.loader.tensors
        return Linear(self._pack([self._weight(shape, "output", dense=not quantized)]))

    def embedding(self, name: str, num_rows: int, width: int) -> Embedding:
        """Token embeddings, this rank's part of the vocabulary."""
        shape = LinearShape(name, width, num_rows, False)
        weight = self._weight(shape, "output", dense=True)
        assert isinstance(weight, Dense)
        return Embedding(weight.weight, self.communicator)

    def norm(self, name: str, size: int) -> torch.Tensor:
        """A norm's weight, the same on every rank."""
        return self.loader.load_vector(name, size, shard=False)

    def attention(self, index: int, norms: tuple[torch.Tensor, torch.Tensor] | None) -> AttentionLayer:
        """Layer `index`'s attention, with norms of queries and keys where the model has them."""
        return self.attention_layer(index, norms)

    def _weight(self, shape: LinearShape, split: str, dense: bool = False) -> Weight:
        plain = dense or self.weight_format.skips(shape.name)
        return self.loader.load(Unquantized() if plain else self.weight_format, shape, split)

    def _pack(self, weights: list[Weight]) -> list[tuple[Matmul, object]]:
        """Each weight with its matmul, in the matmul's layout; dense ones are fused first, which is exact."""
        if len(weights) > 1 and all(isinstance(weight, Dense) for weight in weights):
            weights = [Dense(torch.cat([weight.weight for weight in weights if isinstance(weight, Dense)]))]
        packed: list[tuple[Matmul, object]] = []
        for weight in weights:
            out_features, in_features = weight.shape
            matmul = self.matmul(type(weight), in_features, out_features)
            packed.append((matmul, matmul.pack(weight)))
        return packed
