"""The kernels compiled, on a GPU: a few representative cases, and (slow, it compiles) the whole attention contract."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from octavo.attention.interface import AttentionSpec
from octavo.batch import BatchShape
from octavo.device import current_device
from octavo.testing import AttentionConformance
from octavo.testing.attention import assert_right, build_attention, check_attention, make_case, make_spec
from octavo.testing.gpu import captured
from octavo.testing.graph_buffers import GraphBuffers
from octavo_attention_triton.backend import TritonAttention
from octavo_attention_triton.options import TritonAttentionOptions

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU here.")]

MIXED = ((1, 1), (1, 37), (1, 2040), (9, 50), (12, 12), (65, 700))


@pytest.mark.slow
class TestTriton(AttentionConformance):
    """The contract with the pinned settings."""

    backend = TritonAttention
    num_random_batches = 40


@pytest.mark.slow
class TestTritonWithSplits(AttentionConformance):
    """The contract with each request's keys in seven parts, and ordinary launches."""

    backend = TritonAttention
    options: ClassVar[Any] = TritonAttentionOptions(splits=7, pdl=False)
    dtypes = (torch.bfloat16,)
    num_random_batches = 20


def _spec(**given: Any) -> AttentionSpec:
    """Llama-3.1-8B's heads in bfloat16, unless other ones are given."""
    usual = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
    return make_spec(**(usual | given), device=current_device("cuda"))


@pytest.mark.parametrize(
    "requests", [MIXED, [(1, m) for m in range(30, 90)], [(1, 1500 - i) for i in range(5)], [(200, 200), (3, 1000)]]
)
def test_batches(requests: Sequence[tuple[int, int]]) -> None:
    check_attention(TritonAttention, make_case(_spec(), requests, padding_tokens=3).to("cuda"), with_lse=True)


@pytest.mark.parametrize(
    "given",
    [
        {"window": 33},
        {"softcap": 3.0, "num_kv_heads": 32},
        {"dtype": torch.float16, "num_heads": 14, "num_kv_heads": 2, "head_dim": 80, "block_size": 32},
        {"dtype": torch.float32, "head_dim": 64},
    ],
)
def test_specs(given: dict[str, Any]) -> None:
    check_attention(TritonAttention, make_case(_spec(**given), MIXED, padding_tokens=3).to("cuda"))


@pytest.mark.parametrize(
    "requests",
    [[(600, 600)], [(520, 1999)], [(1, 300), (1, 1), (530, 700), (64, 64), (70, 333)], [(2, 9)] * 60 + [(500, 500)]],
)
def test_large_batches_read_new(requests: Sequence[tuple[int, int]]) -> None:
    """Whole prompts and chunks, by the copy engine where the GPU has one."""
    check_attention(TritonAttention, make_case(_spec(), requests, padding_tokens=5).to("cuda"))


def test_new_is_read_in_a_graph() -> None:
    """The descriptors are copied at capture, and serve later batches at the same addresses."""
    spec = _spec()
    cases = [make_case(spec, requests).to("cuda") for requests in ([(600, 700)], [(600, 1111)], [(600, 600)])]
    shape = BatchShape(600, 1, 600, 0)
    buffers = GraphBuffers(shape, cases)
    backend, _ = build_attention(TritonAttention, spec, None, "cuda")
    plan, (q, k, v) = backend.plan(buffers.load(cases[0])), buffers.qkv
    graph = captured(lambda: backend.forward(plan, q, buffers.kv, buffers.out, new=(k, v)))
    for case in (*cases, cases[0]):
        backend.plan(buffers.load(case))
        graph.replay()
        assert_right(case, buffers.out)


def test_plans_follow_each_other_without_a_pause() -> None:
    """What a kernel reads before the one before it has ended is its own plan's, though nothing lies between them."""
    spec = _spec()
    cases = [
        make_case(spec, requests).to("cuda") for requests in ([(1, 900), (1, 40)], [(1, 3), (70, 90)], [(1, 1500)])
    ]
    backend, _ = build_attention(TritonAttention, spec, None, "cuda")
    backend.warmup([])
    outs = [[torch.full(case.q.shape, torch.nan, dtype=spec.dtype, device="cuda") for case in cases] for _ in range(60)]
    torch.cuda.synchronize()
    for turn in outs:
        for case, out in zip(cases, turn, strict=True):
            plan = backend.plan(case.batch)
            for _ in range(3):
                backend.forward(plan, case.q, case.kv, out, new=case.new)
    for case, first, *others in zip(cases, *outs, strict=True):
        assert_right(case, first)
        assert all(torch.equal(out, first) for out in others)


@triton.jit
def _write_late(places: tl.tensor, values: tl.tensor, count: tl.tensor, NANOSECONDS: tl.constexpr) -> None:
    """Let the next kernel start, and write values [count] of 16 bits to addresses [count] NANOSECONDS later."""
    tl.extra.cuda.gdc_launch_dependents()
    start = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - start < NANOSECONDS:
        pass
    for begin in range(0, count, 1024):
        index = begin + tl.arange(0, 1024)
        place = tl.load(places + index, mask=index < count, other=0).to(tl.pointer_type(tl.int16))
        tl.store(place, tl.load(values + index, mask=index < count, other=0), mask=index < count)
    tl.extra.cuda.gdc_wait()


@pytest.mark.parametrize("extra", [0, 1, 2, 15, 16, 47, 48, 63, 64, 200, 205, 299])
@pytest.mark.parametrize("num_requests", [1, 5, 16, 30, 40, 64])
def test_what_the_kernel_before_writes_is_not_read_early(num_requests: int, extra: int) -> None:
    """Queries and each request's newest keys and values come from a kernel that still runs when attention starts."""
    case = make_case(_spec(), [(1, 1 + 3 * i + extra) for i in range(num_requests)]).to("cuda")
    backend, _ = build_attention(TritonAttention, case.spec, None, "cuda")
    newest, size = case.batch.seq_lens.long() - 1, case.spec.block_size
    blocks = case.batch.block_tables[0].long().gather(1, (newest // size)[:, None])[:, 0]

    def late(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Those elements of the queries and of the cache that are written late."""
        return torch.cat([q.flatten(), *(x.transpose(1, 2)[blocks, newest % size].flatten() for x in (k, v))])

    parts = (case.q, case.kv.k, case.kv.v)
    places, values = late(*map(_addresses, parts)), late(*parts).view(torch.int16)
    plan, out = backend.plan(case.batch), torch.full(case.q.shape, torch.nan, dtype=case.spec.dtype, device="cuda")
    backend.forward(plan, case.q, case.kv, out)
    for written, nanoseconds in ((torch.full_like(values, -1), 0), (values, 1_000_000)):
        _write_late[(1,)](places, written, len(places), NANOSECONDS=nanoseconds, launch_pdl=True)
    backend.forward(plan, case.q, case.kv, out)
    assert_right(case, out)


def _addresses(x: torch.Tensor) -> torch.Tensor:
    """Of each element of x, which may be a view: int64 of its shape."""
    steps = [torch.arange(n, device=x.device) * stride for n, stride in zip(x.shape, x.stride(), strict=True)]
    return x.data_ptr() + x.element_size() * sum(torch.meshgrid(*steps, indexing="ij"))


def _num_compiled() -> int:
    from octavo_attention_triton.decode_kernel import decode_kernel
    from octavo_attention_triton.prefill_kernel import prefill_kernel
    from octavo_attention_triton.schedule_kernel import schedule_kernel

    kernels = (decode_kernel, prefill_kernel, schedule_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("with_lse", [False, True])
def test_nothing_compiles_after_warmup(with_lse: bool) -> None:
    """Whatever the numbers of requests and tokens, the strides and the widths of tables."""
    spec = _spec(block_size=32)
    backend, _ = build_attention(TritonAttention, spec, None, "cuda")
    backend.warmup([BatchShape(1, 1, 1, 1)])
    compiled = _num_compiled()
    assert compiled > 0
    lens: list[list[tuple[int, int]]] = [[(1, 1)], [(1, 16)] * 64, [(1, 700)] * 3, [(1, 33), (7, 40)], [(600, 1024)]]
    for requests in lens:
        case = make_case(spec, requests).to("cuda")
        out = torch.empty(case.q.shape, dtype=spec.dtype, device="cuda")
        lse = torch.empty(case.q.shape[:2], device="cuda") if with_lse else None
        for new in (None, case.new):
            backend.forward(backend.plan(case.batch), case.q, case.kv, out, lse, new)
    assert _num_compiled() == compiled


@pytest.mark.parametrize("num_requests", [1, 5, 64])
def test_counters_are_left_at_zero(num_requests: int) -> None:
    """Many programs at once: all partial results are merged, each time anew, to the same bits."""
    spec = _spec()
    case = make_case(spec, [(1, 1500 - i) for i in range(num_requests)]).to("cuda")
    backend, _ = build_attention(TritonAttention, spec, None, "cuda")
    plan, outs = backend.plan(case.batch), []
    for _ in range(50):
        out = torch.full(case.q.shape, torch.nan, dtype=spec.dtype, device="cuda")
        backend.forward(plan, case.q, case.kv, out)
        outs.append(out)
    assert all(torch.equal(out, outs[0]) for out in outs)
