"""The attention backend: what it serves, its plan (one small kernel a step) and its launches (one or two a layer)."""

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from octavo.attention.interface import AttentionSpec, GraphSupport
from octavo.batch import Batch, BatchShape
from octavo.errors import StepError
from octavo.kv_cache.interface import KVCache

from octavo_attention_triton.options import TritonAttentionOptions
from octavo_attention_triton.sizes import INT_BYTES, DecodeSizes, Sizes, power_of_two
from octavo_attention_triton.tuning import Tuning

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_GROUP = 128
_GEOMETRIES = 1024  # that are remembered: batches outside graphs have ever new shapes
_WARM_UP_PAGES = 2
_KEYLESS_TOKENS = 3  # of the smallest batch that warms up both kernels
_ALIGNMENT = 16  # bytes, of what q, k and v are (contract C9)
_AMPERE, _ADA, _HOPPER = (8, 0), (8, 9), (9, 0)

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What a batch's shape alone decides (contract C5): grids, and the query length that the decode kernel serves.

    `decode` is the place of the decode settings among the sizes'.
    """

    decode_grid: Grid | None
    prefill_grid: Grid | None
    decode_len: int
    decode: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch's grids and block table; its units and tiles lie in the backend's own buffers on the device."""

    geometry: _Geometry
    table: torch.Tensor
    table_stride: int


class TritonAttention:
    """Paged attention in Triton. The units and tiles of the last plan are those that `forward` computes."""

    features = frozenset({"window", "softcap"})
    kv_layouts: frozenset[str] | None = frozenset({"plain", "fp8", "fp8_e5m2", "int8"})
    graph_support = GraphSupport.MIXED
    plans_on_device = True
    deterministic = True
    batch_invariant = False
    tuned: ClassVar[Tuning | None] = None
    """What a subclass takes in place of the table's row: the tune command's candidates."""
    min_own_tokens: ClassVar[int] = 512
    """Batches of fewer tokens are not worth the host's time for the descriptors of `new`."""

    @staticmethod
    def why_not(spec: AttentionSpec, options: Any) -> str | None:
        """Needs Triton, a GPU from Ampere on (or Triton's interpreter), and shapes that its tiles can hold."""
        return _why_not_device(spec) or _why_not_shape(spec)

    @classmethod
    def scratch_bytes(cls, spec: AttentionSpec, options: Any) -> int:
        """Partial results of requests whose keys are cut into several units."""
        return cls._sizes(spec, options).scratch_bytes(_with_room(spec))

    @classmethod
    def persistent_bytes(cls, spec: AttentionSpec, options: Any) -> int:
        """The tables of units and tiles, a counter for each request and KV head, and the pages that warm up."""
        ints = sum(cls._sizes(spec, options).num_persistent_ints(_with_room(spec)))
        return INT_BYTES * ints + _WARM_UP_PAGES * spec.cache_format.page_bytes()

    @classmethod
    def _sizes(cls, spec: AttentionSpec, options: Any) -> Sizes:
        return Sizes.of(spec, options or TritonAttentionOptions(), cls.tuned)

    def __init__(self, spec: AttentionSpec, options: Any, scratch: torch.Tensor) -> None:
        # Triton is imported only where it is going to serve: a machine without it can still ask `why_not`.
        from triton.tools.tensor_descriptor import TensorDescriptor

        from octavo_attention_triton.decode_kernel import decode_kernel
        from octavo_attention_triton.prefill_kernel import prefill_kernel
        from octavo_attention_triton.schedule_kernel import schedule_kernel

        self.spec = spec = _with_room(spec)
        self.options: TritonAttentionOptions = options or TritonAttentionOptions()
        self.sizes = self._sizes(spec, options)
        self._decode, self._prefill, self._schedule = decode_kernel, prefill_kernel, schedule_kernel
        self._descriptor = TensorDescriptor
        device = scratch.device
        sizes = self.sizes.num_persistent_ints(spec)
        self.units, self.tiles, self._counters = (torch.zeros(n, dtype=torch.int32, device=device) for n in sizes)
        self._partials = scratch[: self.sizes.scratch_bytes(spec)].view(torch.float32)
        self._geometries: dict[BatchShape, _Geometry] = {}
        self._fresh = True
        self._page = self._empty_cache(device)
        common = self._common_constants()
        self._schedule_constants = [self._make_schedule_constants(one) for one in self.sizes.decodes]
        self._decode_constants = [common | self._make_decode_constants(one) for one in self.sizes.decodes]
        self._prefill_constants = common | self._make_prefill_constants()
        self._own_constants = self._prefill_constants | self._make_own_constants()
        self._reads_own = self._may_read_own()

    def _make_schedule_constants(self, decode: DecodeSizes) -> dict[str, Any]:
        return {
            "MAX_REQUESTS": power_of_two(self.spec.max_requests),
            "BLOCK_N": decode.tuning.block_n,
            "MIN_CHUNK": decode.min_chunk,
            "BUDGET": decode.budget,
            "SPLITS": decode.splits,
            "WINDOW": self.spec.features.get("window") or 0,
            "TOKENS": self.sizes.tokens_per_tile,
            "num_warps": 4,
        }

    def _common_constants(self) -> dict[str, Any]:
        """Compile-time arguments of both attention kernels. Strides are the KV format's own."""
        spec, sizes = self.spec, self.sizes
        pdl = self.options.pdl and spec.device.type == "cuda" and spec.device.capability >= _HOPPER
        return {
            "SCALE": spec.scale,
            "SOFTCAP": float(spec.features.get("softcap") or 0),
            "WINDOW": spec.features.get("window") or 0,
            "K_STRIDES": self._page.k.stride(),
            "V_STRIDES": self._page.v.stride(),
            "BLOCK_SIZE": spec.block_size,
            "HEAD_DIM": spec.head_dim,
            "BLOCK_D": sizes.block_d,
            "GROUP": sizes.group,
            "PDL": pdl,
            **({"launch_pdl": True} if pdl else {}),
        }

    def _make_decode_constants(self, decode: DecodeSizes) -> dict[str, Any]:
        sizes, tuning = self.sizes, decode.tuning
        return {
            "BLOCK_G": sizes.block_g,
            "MERGE_G": power_of_two(sizes.group),
            "BLOCK_N": tuning.block_n,
            "STAGES": tuning.num_stages,
            "AHEAD": tuning.ahead,
            "RECORD": sizes.record,
            "num_warps": tuning.num_warps,
            "num_stages": tuning.num_stages,
        }

    def _make_prefill_constants(self) -> dict[str, Any]:
        tuning = self.sizes.prefill
        return {
            "BLOCK_M": self.sizes.block_m,
            "BLOCK_N": tuning.block_n,
            "num_warps": tuning.num_warps,
            "num_stages": tuning.num_stages,
        }

    def _make_own_constants(self) -> dict[str, Any]:
        """What differs where this step's keys are read from `new`."""
        max_regs = self.sizes.prefill.max_regs
        return {"maxnreg": max_regs} if max_regs else {}

    def _may_read_own(self) -> bool:
        """Whether the cache holds this step's keys and values as `new` does, in tiles that the copy engine can read."""
        spec, window = self.spec, self.spec.features.get("window")
        same = self._page.k.dtype == self._page.v.dtype == spec.dtype and self._page.k_scale is None
        can = spec.device.type == "cpu" or spec.device.capability >= _HOPPER
        return self.sizes.prefill.own and same and can and not window and spec.head_dim == self.sizes.block_d

    def _empty_cache(self, device: torch.device) -> KVCache:
        """A cache of a few pages, whose strides are those of every layer's."""
        cache_format = self.spec.cache_format
        return cache_format.view(
            torch.zeros(_WARM_UP_PAGES, cache_format.page_bytes(), dtype=torch.uint8, device=device)
        )

    # -- plan -------------------------------------------------------------------------------------------------------

    def plan(self, batch: Batch) -> Plan:
        """Cut the batch into units and tiles on the device: one launch, no copy and no wait."""
        shape = batch.shape
        return self._planned(batch, self._geometries.get(shape) or self._make_geometry(shape))

    def _planned(self, batch: Batch, geometry: _Geometry) -> Plan:
        shape, table = batch.shape, batch.block_tables[self.spec.group]
        if geometry.decode_grid or geometry.prefill_grid:
            self._fresh = True
            self._schedule[(shape.num_requests + 1,)](
                batch.query_start,
                batch.seq_lens,
                self.units,
                self.tiles,
                shape.num_requests,
                shape.num_tokens,
                geometry.decode_grid[1] if geometry.decode_grid else 0,
                geometry.prefill_grid[1] if geometry.prefill_grid else 0,
                geometry.decode_len,
                **self._schedule_constants[geometry.decode],
            )
        return Plan(geometry, table, table.stride(0))

    def _make_geometry(self, shape: BatchShape) -> _Geometry:
        """Both kernels where the batch may hold both; a batch without decodes leaves all requests to the prefill."""
        spec, heads = self.spec, self.spec.num_kv_heads
        if shape.num_tokens > spec.max_tokens or shape.num_requests > spec.max_requests:
            raise StepError(
                f"A batch of {shape.num_requests} requests and {shape.num_tokens} tokens was planned, but the backend"
                f" was built for {spec.max_requests} and {spec.max_tokens}."
            )
        decodes = shape.num_tokens > 0 and shape.num_decodes > 0
        # Tokens that are nobody's are the prefill kernel's, even in a batch of decodes alone.
        alone = shape.num_decodes == shape.num_requests and shape.num_tokens <= shape.num_requests
        tiles = 0 if alone else self.sizes.max_tiles(shape.num_tokens, shape.num_requests)
        geometry = _Geometry(
            (heads, self.sizes.max_units(shape.num_requests)) if decodes else None,
            (heads, tiles) if tiles else None,
            1 if decodes else -1,
            self.sizes.decode_index(max(shape.num_requests, 1)),
        )
        if len(self._geometries) == _GEOMETRIES:
            self._geometries.clear()
        self._geometries[shape] = geometry
        return geometry

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        plan: Plan,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Attend: q [T, Hq, D] -> out [T, Hq, D], and lse [T, Hq] where it is given.

        Of `new` the prefill kernel reads what a large batch computes for the first time, all else comes from the cache.
        """
        geometry = plan.geometry
        tensors = (q, kv.k, kv.v, out, lse, kv.k_scale, kv.v_scale)
        scalars = (q.stride(0) * q.element_size() // _ALIGNMENT, plan.table_stride, int(self._fresh))
        if geometry.decode_grid:
            own = (self.units, plan.table, self._partials, self._counters)
            self._decode[geometry.decode_grid](*tensors, *own, *scalars, **self._decode_constants[geometry.decode])
        if geometry.prefill_grid:
            descriptors = self._describe(new) if new is not None and lse is None else None
            constants = self._own_constants if descriptors else self._prefill_constants
            own = (self.tiles, plan.table, *(descriptors or (None, None)))
            self._prefill[geometry.prefill_grid](*tensors, *own, *scalars, **constants)
        self._fresh = False

    def _describe(self, new: tuple[torch.Tensor, torch.Tensor]) -> list[Any] | None:
        """TMA descriptors of k and v as [T, Hk D] in tiles of one head; None where they do not pay."""
        if not self._reads_own or new[0].shape[0] < self.min_own_tokens:
            return None
        if not all(_is_tileable(x) for x in new):
            return None
        spec, tile = self.spec, [self.sizes.prefill.block_n, self.spec.head_dim]
        columns = spec.num_kv_heads * spec.head_dim
        return [self._descriptor(x, [x.shape[0], columns], [x.stride(0), 1], tile) for x in new]

    # -- warm-up ----------------------------------------------------------------------------------------------------

    def warmup(self, shapes: list[BatchShape]) -> None:
        """Compile all kernels in all their variants, by batches whose requests have no keys.

        Lengths, strides and grids are not part of what Triton specialises on, so this covers every shape.
        """
        for decode in range(len(self.sizes.decodes)):
            for with_lse in (False, True):
                self._warm_up(_KEYLESS_TOKENS, decode, with_lse)
        if self._reads_own and self.min_own_tokens <= self.spec.max_tokens:
            self._warm_up(max(self.min_own_tokens, _KEYLESS_TOKENS), 0, False)

    def _warm_up(self, num_tokens: int, decode: int, with_lse: bool) -> None:
        """Run a batch of a request of one token, a request of two, and tokens that are nobody's."""
        spec, device = self.spec, self.units.device
        batch = _keyless_batch(spec.group, num_tokens, device)
        geometry = replace(self._make_geometry(batch.shape), decode=decode)
        heads = spec.num_heads + 2 * spec.num_kv_heads
        qkv = torch.zeros(num_tokens, heads, spec.head_dim, dtype=spec.dtype, device=device)
        q, k, v = torch.split_with_sizes(qkv, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        out = torch.empty(q.shape, dtype=spec.dtype, device=device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=device) if with_lse else None
        plan = self._planned(batch, geometry)
        self.forward(plan, q, self._page, out, lse, (k, v))


def _with_room(spec: AttentionSpec) -> AttentionSpec:
    """The spec with room for the batch that `warmup` runs."""
    return replace(spec, max_requests=max(spec.max_requests, 2), max_tokens=max(spec.max_tokens, _KEYLESS_TOKENS))


def _keyless_batch(group: int, num_tokens: int, device: torch.device) -> Batch:
    """A request of one token, one of two, both with seq_len 0, and tokens that are nobody's."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    nothing = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    return Batch(
        shape=BatchShape(num_tokens, 2, 2, 1),
        token_ids=nothing,
        positions=nothing,
        query_start=ints(0, 1, 3),
        seq_lens=ints(0, 0),
        row_index=ints(0, 1),
        block_tables=tuple(ints(0, 0).view(2, 1) for _ in range(group + 1)),
        slots=tuple(nothing.long() - 1 for _ in range(group + 1)),
        sample_index=ints(0, 2),
        query_start_host=[0, 1, 3],
        seq_lens_host=[0, 0],
    )


def _is_tileable(x: torch.Tensor) -> bool:
    """Whether the copy engine can read x [T, Hk, D] as [T, Hk D]."""
    starts = (x.data_ptr(), x.stride(0) * x.element_size())
    return x.stride(1) == x.shape[2] and x.stride(2) == 1 and all(n % _ALIGNMENT == 0 for n in starts)


def _why_not_device(spec: AttentionSpec) -> str | None:
    device = spec.device
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: install octavo[triton]"
    if device.type == "cuda":
        if device.capability < _AMPERE:
            return f"it needs a GPU of capability 8.0 or newer, and {device.name} has {device.capability}"
        if spec.kv_layout == "fp8" and device.capability < _ADA:
            return f"the fp8 KV cache needs a GPU of capability 8.9 or newer, and {device.name} has {device.capability}"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return None
    return f"it needs an NVIDIA GPU, and the device is {device.name}"


def _why_not_shape(spec: AttentionSpec) -> str | None:
    if spec.dtype not in _DTYPES:
        return f"it computes in bfloat16, float16 and float32, and the model's dtype is {spec.dtype}"
    if spec.head_dim % 16 or not 16 <= spec.head_dim <= 256:
        return f"it serves head sizes that are multiples of 16 from 16 to 256, not {spec.head_dim}"
    if spec.block_size.bit_count() != 1 or not 8 <= spec.block_size <= 128:
        return f"it serves blocks of 8 to 128 tokens, powers of two, not of {spec.block_size}"
    if spec.num_heads % spec.num_kv_heads or spec.num_heads // spec.num_kv_heads > _MAX_GROUP:
        return (
            f"it serves up to {_MAX_GROUP} query heads for each KV head, not {spec.num_heads} for {spec.num_kv_heads}"
        )
    return None
