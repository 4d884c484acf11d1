"""The attention contract (docs/design.md §6) as tests: subclass AttentionConformance, set `backend`. Needs pytest."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch

from octavo.attention.interface import AttentionBackend, AttentionSpec, GraphSupport, plan_on_device
from octavo.batch import BatchShape
from octavo.kv_cache.interface import KVCache, KVCacheFormat
from octavo.kv_cache.plain import PlainFormat
from octavo.testing.attention import (
    POISON,
    AttentionCase,
    assert_right,
    build_attention,
    check_attention,
    make_case,
    make_spec,
    run_attention,
)
from octavo.testing.conformance import Conformance
from octavo.testing.gpu import captured, no_synchronisation, num_allocations
from octavo.testing.graph_buffers import GraphBuffers, graph_batches

MIXED = ((1, 1), (1, 37), (1, 64), (9, 50), (12, 12), (12, 12))
"""Decodes, a chunk after cached tokens, whole prompts."""

GQA = ((2, 1), (1, 4), (1, 7), (1, 8))
"""KV heads, and query heads of each."""

_EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257)
_BIG_BYTES = 0x7B  # a byte that repeated is a large number in every dtype
_FAR = 1 << 31
Requests = Sequence[tuple[int, int]]
_SUPPORTS = pytest.mark.parametrize("support", [GraphSupport.DECODE, GraphSupport.UNIFORM, GraphSupport.MIXED])


def refusal(backend: type[AttentionBackend], spec: AttentionSpec, options: Any = None) -> str | None:
    """Why the core would not choose the backend for `spec`: a lacking feature, the layout, or its own reason."""
    lacking = sorted(name for name, value in spec.features.items() if value and name not in backend.features)
    if lacking:
        return f"it does not support {', '.join(lacking)}"
    if backend.kv_layouts is not None and spec.kv_layout not in backend.kv_layouts:
        return f"it does not read the KV layout {spec.kv_layout}"
    return backend.why_not(spec, options)


class AttentionConformance(Conformance):
    """Every rule of the contract on `backend` with `options`; a test of what the backend refuses is skipped.

    `num_random_batches` is how many batches test_random_shapes draws, `cache_format` what the cache is in.
    """

    backend: ClassVar[type[AttentionBackend]]
    options: ClassVar[Any] = None
    cache_format: ClassVar[type[KVCacheFormat]] = PlainFormat
    num_random_batches: ClassVar[int] = 24

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Adds a `seed` for each random batch to what the base does."""
        super().pytest_generate_tests(metafunc)
        if "seed" in metafunc.fixturenames:
            metafunc.parametrize("seed", range(self.num_random_batches))

    # -- cases ------------------------------------------------------------------------------------------------------

    def make_spec(self, dtype: torch.dtype, **given: Any) -> AttentionSpec:
        """`make_spec` for this device and cache format."""
        return make_spec(dtype=dtype, device=self.device_info, cache_format=self.cache_format, **given)

    def spec(self, dtype: torch.dtype, **given: Any) -> AttentionSpec:
        """The same; skips the test where the backend refuses it."""
        spec = self.make_spec(dtype, **given)
        reason = refusal(self.backend, spec, self.options)
        if reason is not None:
            pytest.skip(f"The backend refuses: {reason}.")
        return spec

    def case(self, spec: AttentionSpec, requests: Requests, **given: Any) -> AttentionCase:
        """`make_case` on the CPU, moved to the device."""
        return make_case(spec, requests, **given).to(self.device_info.torch_device)

    def check(self, case: AttentionCase) -> None:
        """Check with a log-sum-exp, from the cache alone; and without one, with this step's keys and values at hand."""
        check_attention(self.backend, case, self.options, with_lse=True, with_new=False)
        check_attention(self.backend, case, self.options, with_lse=False, with_new=True)

    def run(self, case: AttentionCase) -> torch.Tensor:
        """`run_attention`'s output."""
        return run_attention(self.backend, case, self.options)[0]

    def build(self, spec: AttentionSpec) -> AttentionBackend:
        """The backend on the device."""
        return build_attention(self.backend, spec, self.options, self.device_info.torch_device)[0]

    # -- the contract -----------------------------------------------------------------------------------------------

    def test_serves_some_dtype(self) -> None:
        """At least one of `dtypes` is served: the other tests would all be skipped otherwise."""
        reasons = [refusal(self.backend, self.make_spec(dtype), self.options) for dtype in self.dtypes]
        assert None in reasons, f"The backend refuses every dtype: {reasons}"

    def test_c1_causal_alignment(self, dtype: torch.dtype) -> None:
        """Query i sits at seq_len - query_len + i, in chunks that follow cached tokens and in whole prompts."""
        self.check(self.case(self.spec(dtype), MIXED))
        self.check(self.case(self.spec(dtype), [(3, 40), (40, 41), (33, 97)]))

    @pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
    @pytest.mark.parametrize(("num_kv_heads", "group"), GQA)
    def test_c1_grouped_heads(self, dtype: torch.dtype, num_kv_heads: int, group: int, head_dim: int) -> None:
        """Query heads 0 to group - 1 share KV head 0, and so on."""
        heads = {"num_heads": num_kv_heads * group, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self.check(self.case(self.spec(dtype, **heads), [(1, 37), (1, 20), (9, 50)]))

    @pytest.mark.parametrize("block_size", [16, 32, 64])
    def test_c1_block_edges(self, dtype: torch.dtype, block_size: int) -> None:
        """Lengths at the edges of blocks, whose order in memory is random: decoding, as chunks, as prompts."""
        spec = self.spec(dtype, block_size=block_size)
        lens = [block_size - 1, block_size, block_size + 1, 2 * block_size, 3 * block_size + 1]
        for requests in ([(1, m) for m in lens], [(5, m) for m in lens], [(m, m) for m in lens]):
            self.check(self.case(spec, requests))

    @pytest.mark.parametrize("window", [1, 8, 17, 64])
    def test_c1_window(self, dtype: torch.dtype, window: int) -> None:
        """Key j is seen iff i - w < j <= i; blocks behind the window are the null block."""
        spec = self.spec(dtype, window=window)
        self.check(self.case(spec, [(1, m) for m in (1, 7, 16, 17, 23, 40, 81)]))
        self.check(self.case(spec, [(1, 64), (3, 20), (24, 64), (70, 90)]))

    def test_c2_the_cache_is_read(self, dtype: torch.dtype) -> None:
        """Without `new`, this step's keys and values come from the cache, where they already are."""
        case = self.case(self.spec(dtype), [(1, 20), (6, 30), (20, 20)])
        check_attention(self.backend, case, self.options, with_new=False)

    def test_c3_padding(self, dtype: torch.dtype) -> None:
        """Padding has finite output, in a decode graph, in a mixed batch, and where there is nothing else."""
        spec = self.spec(dtype)
        self.check(self.case(spec, [(1, 20), (1, 33)], padding_requests=6))
        self.check(self.case(spec, [(1, 20), (6, 33)], padding_requests=3, padding_tokens=5))
        self.check(self.case(spec, [], padding_requests=4))

    def test_c7_offsets_beyond_32_bits(self, tmp_path: Path) -> None:
        """The far end of a cache of more than 2^31 elements (on a CPU a file with a hole)."""
        served = [one for one in self.dtypes if one.itemsize == 2] or list(self.dtypes)
        spec = self.spec(served[0], num_heads=8, num_kv_heads=8, head_dim=128, block_size=32)
        case = self.case(spec, [(1, 50), (4, 70)])
        page_bytes = spec.cache_format.page_bytes()
        shift = _FAR * spec.dtype.itemsize // page_bytes + 1
        kv = self._far_cache(spec, shift + len(case.kv.raw), tmp_path)
        kv.raw[shift:] = case.kv.raw
        batch = replace(case.batch, block_tables=(case.batch.block_tables[0] + shift,))
        backend, out = self.build(spec), torch.full(case.q.shape, torch.nan, dtype=spec.dtype, device=case.q.device)
        backend.forward(backend.plan(batch), case.q, kv, out)
        assert_right(case, out)

    def _far_cache(self, spec: AttentionSpec, num_blocks: int, tmp_path: Path) -> KVCache:
        size = num_blocks * spec.cache_format.page_bytes()
        if self.device_info.type == "cpu":
            flat = torch.from_file(str(tmp_path / "cache"), shared=True, size=size, dtype=torch.uint8)
        else:
            flat = torch.empty(size, dtype=torch.uint8, device=self.device_info.torch_device)
        return spec.cache_format.view(flat.view(num_blocks, -1))

    def test_c8_lse(self, dtype: torch.dtype) -> None:
        """The natural logarithm, -inf for padding."""
        case = self.case(self.spec(dtype), MIXED, padding_requests=1, padding_tokens=2)
        check_attention(self.backend, case, self.options, with_lse=True)

    def test_c8_splits_are_merged(self, dtype: torch.dtype) -> None:
        """A few long requests, which a backend may attend in parts, beside short ones."""
        spec = self.spec(dtype)
        self.check(self.case(spec, [(1, 2040)]))
        self.check(self.case(spec, [(1, 1500), (1, 3), (1, 1024), (20, 1400)]))

    def test_c8_lse_of_large_scores(self) -> None:
        """The same where exp would overflow float32: scores beyond 90."""
        case = self.case(self.spec(self.dtypes[0]), [(1, 60), (10, 40)], magnitude=8.0)
        assert case.expected.lse.max() > 90
        check_attention(self.backend, case, self.options, with_lse=True)

    def test_c9_views_and_strides(self, dtype: torch.dtype) -> None:
        """Queries, keys and values are slices of one tensor, tables of a wider one; contiguous ones serve as well."""
        case = self.case(self.spec(dtype), [(1, 20), (7, 20)])
        assert not case.q.is_contiguous() and not case.batch.block_tables[0].is_contiguous()
        self.check(case)
        k, v = (x.contiguous() for x in case.new)
        tables = tuple(table.contiguous() for table in case.batch.block_tables)
        self.check(replace(case, q=case.q.contiguous(), new=(k, v), batch=replace(case.batch, block_tables=tables)))

    def test_c9_no_tokens(self, dtype: torch.dtype) -> None:
        """A batch without tokens is nothing to do."""
        self.check(self.case(self.spec(dtype), []))

    @pytest.mark.parametrize("poison", [POISON, _BIG_BYTES])
    def test_c10_unused_slots_are_poisoned(self, dtype: torch.dtype, poison: int) -> None:
        """Slots past a request's end and the null block hold NaN, or numbers so large that they would drown all."""
        self.check(self.case(self.spec(dtype), [(1, 5), (1, 33), (3, 18), (31, 31)], poison=poison))
        windowed = self.make_spec(dtype, window=9)
        if refusal(self.backend, windowed, self.options) is None:
            self.check(self.case(windowed, [(1, 61), (4, 32), (20, 20)], poison=poison, padding_requests=1))

    @pytest.mark.parametrize("features", [{"softcap": 2.5}, {"softcap": 30.0}, {"softcap": 4.0, "window": 11}])
    def test_c11_softcap(self, dtype: torch.dtype, features: dict[str, float]) -> None:
        """Scores are capped once they are scaled, and then masked."""
        self.check(self.case(self.spec(dtype, **features), MIXED, magnitude=2.0))

    def test_c11_scale(self, dtype: torch.dtype) -> None:
        """The spec's own scale, which need not be D ** -0.5."""
        self.check(self.case(replace(self.spec(dtype), scale=0.21), MIXED))

    def test_c11_exact_scores(self, dtype: torch.dtype) -> None:
        """Products of many keys are summed in float32: large scores rounded to the dtype would show."""
        spec = self.spec(dtype, num_heads=9, num_kv_heads=3)
        self.check(self.case(spec, [(1, 256)] * 32, magnitude=2.0))

    @pytest.mark.parametrize("requests", [[(1, 30)] * 40, [(1, m) for m in range(30, 70)], [(9, 40), (20, 20)]])
    def test_c12_same_bits(self, dtype: torch.dtype, requests: Requests) -> None:
        """The same inputs give the same bits."""
        if not self.backend.deterministic:
            pytest.skip("The backend says that it is not deterministic.")
        case = self.case(self.spec(dtype, head_dim=128), requests)
        first = self.run(case)
        for _ in range(3):
            assert torch.equal(self.run(case), first), "C12: the same inputs gave other bits"

    def test_c13_writes_nothing_else(self, dtype: torch.dtype) -> None:
        """Cache, inputs, tables, and what lies around out, lse and scratch stay as they are."""
        for requests in (MIXED, [(1, 20), (1, 300)]):
            case = self.case(self.spec(dtype), requests, padding_tokens=1)
            run_attention(self.backend, case, self.options, with_lse=True)

    # -- plans, scratch, batches ------------------------------------------------------------------------------------

    def test_plans_serve_every_layer(self, dtype: torch.dtype) -> None:
        """A plan serves one layer after another, whatever was planned before it."""
        backend = self.build(self.spec(dtype))
        cases = [self.case(self.spec(dtype), requests, seed=3) for requests in (MIXED, [(1, 33), (1, 8), (8, 8)])]
        for case in (*cases, *cases):
            plan, out = backend.plan(case.batch), torch.empty_like(case.q.contiguous())
            for _ in range(2):
                backend.forward(plan, case.q, case.kv, out.fill_(torch.nan))
                assert_right(case, out)

    def test_scratch_is_dead_after_forward(self, dtype: torch.dtype) -> None:
        """Other backends use the scratch between two layers."""
        spec = self.spec(dtype)
        case = self.case(spec, [(1, 20), (1, 700), (6, 30)])
        backend, scratch = build_attention(self.backend, spec, self.options, case.q.device)
        plan, out = backend.plan(case.batch), torch.empty_like(case.q.contiguous())
        for byte in (0x00, POISON, 0x3C):
            scratch.fill_(byte)
            backend.forward(plan, case.q, case.kv, out.fill_(torch.nan))
            assert_right(case, out)

    def test_batch_invariant(self, dtype: torch.dtype) -> None:
        """Where the backend promises it, a request alone gets the bits that it gets among others."""
        if not self.backend.batch_invariant:
            pytest.skip("The backend does not promise batch invariance.")
        spec = self.spec(dtype)
        together = self.case(spec, [(1, 200), (1, 333), *((1, m) for m in range(3, 60))])
        out, backend = self.run(together), self.build(spec)
        for i in range(2):
            batch, alone = together.batch, torch.empty_like(out[:1])
            part = slice(i, i + 1)
            batch = replace(
                batch,
                shape=BatchShape(1, 1, 1, 1),
                query_start=batch.query_start[:2],
                **{name: getattr(batch, name)[part] for name in ("token_ids", "positions", "seq_lens", "row_index")},
                block_tables=(batch.block_tables[0][part],),
                slots=(batch.slots[0][part],),
                query_start_host=[0, 1],
                seq_lens_host=batch.seq_lens_host[part],
            )
            backend.forward(backend.plan(batch), together.q[part], together.kv, alone)
            assert torch.equal(alone, out[part]), "a request's bits depend on its neighbours"

    def test_random_shapes(self, dtype: torch.dtype, seed: int) -> None:
        """Heads, head sizes, block sizes and features at random; lengths at the edges of blocks and tiles."""
        random = Random(seed)
        num_kv_heads, group = random.choice(GQA)
        shape: dict[str, Any] = {"num_kv_heads": num_kv_heads, "num_heads": num_kv_heads * group}
        shape["head_dim"], shape["block_size"] = random.choice([64, 80, 128, 256]), random.choice([16, 32, 64])
        shape |= random.choice([{}, {}, {"window": 33}, {"softcap": 3.0}])
        decodes = [(1, random.choice(_EDGES)) for _ in range(random.randrange(6))]
        chunks = [(random.choice(_EDGES[1:9]), random.choice((0, *_EDGES[:12]))) for _ in range(random.randrange(4))]
        padding = {"padding_requests": random.randrange(3), "padding_tokens": random.randrange(3)}
        requests = [*decodes, *((n, n + cached) for n, cached in chunks)]
        case = self.case(self.spec(dtype, **shape), requests, seed=seed, **padding)
        how = {"with_lse": random.random() < 0.5, "with_new": random.random() < 0.5}
        check_attention(self.backend, case, self.options, **how)

    # -- graphs -----------------------------------------------------------------------------------------------------

    def test_padded_buffers(self, dtype: torch.dtype) -> None:
        """Batches in buffers as wide and as padded as a graph's, without a graph."""
        spec = self.spec(dtype)
        cases, shape = self._graph_cases(spec, GraphSupport.DECODE)
        buffers, backend = GraphBuffers(shape, cases), self.build(spec)
        for case in cases:
            backend.forward(backend.plan(buffers.load(case)), buffers.qkv[0], buffers.kv, buffers.out)
            assert_right(case, buffers.out)

    def test_c4_no_sync_no_allocation(self, dtype: torch.dtype) -> None:
        """`forward` waits for nothing and allocates nothing, once it has run."""
        self._need_graphs(GraphSupport.DECODE)
        case = self.case(self.spec(dtype), [(1, m) for m in (20, 700, 1500)])
        backend, out = self.build(case.spec), torch.empty_like(case.q.contiguous())
        backend.warmup([case.batch.shape])
        plan = backend.plan(case.batch)
        backend.forward(plan, case.q, case.kv, out, new=case.new)
        with no_synchronisation():
            before = num_allocations()
            backend.forward(plan, case.q, case.kv, out, new=case.new)
            assert num_allocations() == before, "C4: forward allocates"

    def test_c6_plan_does_not_sync(self, dtype: torch.dtype) -> None:
        """`plan` waits for nothing either: no copy from pageable memory, nothing read back."""
        self._need_graphs(GraphSupport.DECODE)
        case = self.case(self.spec(dtype), [(1, m) for m in (20, 700, 1500)])
        backend = self.build(case.spec)
        backend.plan(case.batch)
        with no_synchronisation():
            backend.plan(case.batch)

    def test_c6_plan_reads_tensors_alone(self, dtype: torch.dtype) -> None:
        """Where the backend says `plans_on_device`, what the host believes of a batch does not count."""
        self._need_plan_on_device()
        case = self.case(self.spec(dtype), MIXED)
        nothing = [0] * len(MIXED)
        backend, out = self.build(case.spec), torch.empty_like(case.q.contiguous())
        plan = backend.plan(replace(case.batch, query_start_host=[0, *nothing], seq_lens_host=nothing))
        backend.forward(plan, case.q, case.kv, out.fill_(torch.nan))
        assert_right(case, out)

    @_SUPPORTS
    def test_graph_replay(self, dtype: torch.dtype, support: GraphSupport) -> None:
        """Captured once, a graph serves batches of other lengths after `plan` (C5): shorter, longer, less padded."""
        self._need_graphs(support)
        cases, buffers, backend = self._graph_parts(dtype, support)
        plan = backend.plan(buffers.load(cases[0]))
        graph = captured(lambda: backend.forward(plan, buffers.qkv[0], buffers.kv, buffers.out))
        for case in (*cases, cases[0]):
            backend.plan(buffers.load(case))
            graph.replay()
            assert_right(case, buffers.out)

    @_SUPPORTS
    def test_graph_holds_the_plan(self, dtype: torch.dtype, support: GraphSupport) -> None:
        """Where the backend says `plans_on_device`, a graph of `plan` and `forward` serves them by itself."""
        self._need_graphs(support)
        self._need_plan_on_device()
        cases, buffers, backend = self._graph_parts(dtype, support)
        batch = buffers.load(cases[0])
        graph = captured(lambda: backend.forward(backend.plan(batch), buffers.qkv[0], buffers.kv, buffers.out))
        for case in (*cases, cases[0]):
            buffers.load(case)
            graph.replay()
            assert_right(case, buffers.out)

    def _need_plan_on_device(self) -> None:
        if not plan_on_device((self.backend,)):
            pytest.skip("The backend does not say plans_on_device.")

    def _graph_parts(
        self, dtype: torch.dtype, support: GraphSupport
    ) -> tuple[list[AttentionCase], GraphBuffers, AttentionBackend]:
        spec = self.spec(dtype)
        cases, shape = self._graph_cases(spec, support)
        backend = self.build(spec)
        backend.warmup([shape])
        return cases, GraphBuffers(shape, cases), backend

    def _need_graphs(self, support: GraphSupport) -> None:
        self.need_gpu()
        if self.backend.graph_support < support:
            pytest.skip(f"The backend's graph_support is {self.backend.graph_support.name}.")

    def _graph_cases(self, spec: AttentionSpec, support: GraphSupport) -> tuple[list[AttentionCase], BatchShape]:
        """Batches of one padded shape and of different lengths."""
        batches, shape = graph_batches(support)
        return [self.case(spec, requests, **padding) for requests, padding in batches], shape
