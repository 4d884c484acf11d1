"""The fused ops as a decoder of some shape calls them: inputs, the call, what is right, and the bytes to move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from octavo.kv_cache.interface import KVSpec
from octavo.kv_cache.plain import PlainFormat
from octavo.testing import ops as oracles
from octavo.testing.ops import Wanted

from octavo_workbench.compare.sizes import Shape

_EPS = 1e-5
_MAX_POSITION = 8192

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class OpCase:
    """An op at work: `inputs` (some of which it may overwrite), the call that gives results, and what is right.

    `wanted` takes the inputs as they were before the call, and the results, by which a norm of a rounded sum is judged.
    """

    inputs: Tensors
    call: Callable[[Any, Tensors], Tensors]
    wanted: Callable[[Tensors, Tensors], list[Wanted]]
    num_bytes: int
    num_flops: int


def op_case(op: str, shape: Shape, num_tokens: int, dtype: torch.dtype, block_size: int) -> OpCase:
    """The op on random inputs, made on torch's default device."""
    return _CASES[op](shape, num_tokens, dtype, block_size)


def _random(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*sizes).to(dtype)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _rms_norm(shape: Shape, num_tokens: int, dtype: torch.dtype, block_size: int) -> OpCase:
    """Of the float32 residual stream."""
    x, weight = _random(num_tokens, shape.hidden_size, dtype=torch.float32), torch.rand(shape.hidden_size).to(dtype)
    return OpCase(
        (x, weight),
        lambda ops, t: (ops.rms_norm(t[0], t[1], _EPS),),
        lambda t, _: [oracles.rms_norm(t[0], t[1], _EPS)],
        _bytes(x, weight) + x.numel() * dtype.itemsize,
        4 * x.numel(),
    )


def _add_rms_norm(shape: Shape, num_tokens: int, dtype: torch.dtype, block_size: int) -> OpCase:
    """Of a layer's output and the float32 residual stream, read and written."""
    sizes = (num_tokens, shape.hidden_size)
    x, residual = _random(*sizes, dtype=dtype), _random(*sizes, dtype=torch.float32)
    weight = torch.rand(shape.hidden_size).to(dtype)
    return OpCase(
        (x, residual, weight),
        lambda ops, t: tuple(ops.add_rms_norm(t[0], t[1], t[2], _EPS)),
        lambda t, got: [oracles.rms_norm(got[1], t[2], _EPS), oracles.added(t[0], t[1])],
        _bytes(x, x, residual, residual, weight),
        5 * x.numel(),
    )


def _silu_and_mul(shape: Shape, num_tokens: int, dtype: torch.dtype, block_size: int) -> OpCase:
    x = _random(num_tokens, 2 * shape.intermediate_size, dtype=dtype)
    return OpCase(
        (x,),
        lambda ops, t: (ops.silu_and_mul(t[0]),),
        lambda t, _: [oracles.silu_and_mul(t[0])],
        _bytes(x) * 3 // 2,
        3 * x.numel(),
    )


def _turned(shape: Shape, num_tokens: int, dtype: torch.dtype) -> Tensors:
    """qkv, positions and the table of angles."""
    qkv = _random(num_tokens, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, dtype=dtype)
    positions = (torch.arange(num_tokens) % _MAX_POSITION).int()
    cos_sin = oracles.rotary_table(_MAX_POSITION, shape.head_dim)
    return qkv, positions, cos_sin


def _rotary(shape: Shape, num_tokens: int, dtype: torch.dtype, block_size: int) -> OpCase:
    qkv, positions, cos_sin = _turned(shape, num_tokens, dtype)
    count = shape.num_heads + shape.num_kv_heads

    def call(ops: Any, t: Tensors) -> Tensors:
        ops.rotary(t[0][:, :count], t[1], t[2])
        return (t[0][:, :count],)

    turned = qkv[:, :count]
    return OpCase(
        (qkv, positions, cos_sin),
        call,
        lambda t, _: [oracles.rotary(t[0][:, :count], t[1], t[2])],
        2 * _bytes(turned) + _bytes(positions) + num_tokens * shape.head_dim * 4,
        3 * turned.numel(),
    )


def _rotary_and_write(shape: Shape, num_tokens: int, dtype: torch.dtype, block_size: int) -> OpCase:
    """Into blocks in random order."""
    qkv, positions, cos_sin = _turned(shape, num_tokens, dtype)
    plain = PlainFormat(KVSpec(shape.num_kv_heads, shape.head_dim, block_size, dtype))
    num_blocks = -(-num_tokens // block_size)
    where = torch.arange(num_tokens)
    slots = (torch.randperm(num_blocks) + 1)[where // block_size] * block_size + where % block_size
    raw = torch.zeros(num_blocks + 1, plain.page_bytes(), dtype=torch.uint8)
    heads = shape.num_heads
    count = heads + shape.num_kv_heads

    def call(ops: Any, t: Tensors) -> Tensors:
        qk, kv = t[0][:, :count], plain.view(t[3])
        ops.rotary_and_write(qk, t[0][:, count:], t[1], t[2], heads, plain, kv, t[4])
        return (qk,)

    turned, written = qkv[:, :count], 2 * num_tokens * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    return OpCase(
        (qkv, positions, cos_sin, raw, slots),
        call,
        lambda t, _: [oracles.rotary(t[0][:, :count], t[1], t[2])],
        2 * _bytes(turned) + _bytes(positions, slots) + num_tokens * shape.head_dim * 4 + written * 3 // 2,
        3 * turned.numel(),
    )


_CASES: dict[str, Callable[[Shape, int, torch.dtype, int], OpCase]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "silu_and_mul": _silu_and_mul,
    "rotary": _rotary,
    "rotary_and_write": _rotary_and_write,
}
