"""The layers that decoder models share. They hold packed weights and the providers that compute with them."""

from dataclasses import dataclass
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend
from octavo.batch import Batch
from octavo.distributed.interface import Communicator
from octavo.kv_cache.interface import KVCache, KVCacheFormat
from octavo.ops.interface import FusedOps
from octavo.weights.interface import Activation, Matmul


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens [S] of a batch whose hidden states are asked for, and the batch that they are by themselves."""

    tokens: torch.Tensor
    batch: Batch


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a step's layers share: the batch, a plan of each KV group, and every layer's cache.

    Where only some tokens are `wanted`, what follows the write of the last K and V is computed for them alone.
    """

    batch: Batch
    plans: tuple[Any, ...]
    caches: tuple[KVCache, ...]
    wanted: Wanted | None = None


@dataclass(frozen=True, slots=True)
class Ops:
    """The provider of each op."""

    rms_norm: FusedOps
    add_rms_norm: FusedOps
    silu_and_mul: FusedOps
    rotary: FusedOps
    rotary_and_write: FusedOps


class Linear:
    """A linear layer of one or more parts, each with its matmul; outputs are laid side by side.

    With `reduce` (row parallel) the ranks' results are added.
    """

    def __init__(
        self,
        parts: list[tuple[Matmul, Any]],
        bias: torch.Tensor | None = None,
        reduce: Communicator | None = None,
    ) -> None:
        self.parts = parts
        self.bias = bias
        self.reduce = reduce

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, in] -> [T, out], into `out` where given."""
        activation = Activation(x)
        if len(self.parts) == 1:
            matmul, packed = self.parts[0]
            y = matmul.apply(activation, packed, self.bias, out)
        else:
            y = torch.cat([matmul.apply(activation, packed, None) for matmul, packed in self.parts], dim=-1, out=out)
            if self.bias is not None:
                y += self.bias
        return y if self.reduce is None else self.reduce.all_reduce(y)


class Embedding:
    """Token embeddings; with several ranks each holds a range of the vocabulary."""

    def __init__(self, weight: torch.Tensor, communicator: Communicator) -> None:
        self.weight = weight
        self.communicator = communicator

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] -> [T, H]."""
        if self.communicator.size == 1:
            return torch.nn.functional.embedding(token_ids, self.weight)
        local = token_ids - self.communicator.rank * self.weight.shape[0]
        inside = (local >= 0) & (local < self.weight.shape[0])
        rows = torch.nn.functional.embedding(local.where(inside, 0), self.weight)
        return self.communicator.all_reduce(rows.masked_fill_(~inside.unsqueeze(-1), 0))


@dataclass(slots=True)
class AttentionLayer:
    """Rotary, the write of K and V, attention: one layer's part of a KV group."""

    index: int
    group: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    backend: AttentionBackend
    cache_format: KVCacheFormat
    cos_sin: torch.Tensor
    ops: Ops
    qk_norms: tuple[torch.Tensor, torch.Tensor] | None = None
    norm_eps: float = 0.0

    def __call__(self, qkv: torch.Tensor, step: StepContext, wanted: Wanted | None = None) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hk) D], overwritten -> [T, Hq D], or [S, Hq D] of the tokens `wanted`."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = qkv.view(-1, heads + 2 * kv_heads, self.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.qk_norms is not None:
            for part, weight in zip((qk[:, :heads], qk[:, heads:]), self.qk_norms, strict=True):
                part.copy_(self.ops.rms_norm.rms_norm(part, weight, self.norm_eps))
        batch, kv = step.batch, step.caches[self.index]
        slots = batch.slots[self.group]
        self.ops.rotary_and_write.rotary_and_write(
            qk, v, batch.positions, self.cos_sin, heads, self.cache_format, kv, slots
        )
        q, plan = qk[:, :heads], step.plans[self.group]
        new: tuple[torch.Tensor, torch.Tensor] | None = (qk[:, heads:], v)
        if wanted is not None:
            q, plan, new = q.index_select(0, wanted.tokens), self.backend.plan(wanted.batch), None
        out = q.new_empty(q.shape[0], heads, self.head_dim)
        self.backend.forward(plan, q, kv, out, new=new)
        return out.view(q.shape[0], -1)
