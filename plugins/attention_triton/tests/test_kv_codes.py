"""Pages of 8-bit codes with scales: read by the kernels in Triton's interpreter, and by the torch reference."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from octavo.attention.torch_reference import TorchAttention
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache
from octavo.testing.attention import assert_right, build_attention, check_attention, make_case, make_spec
from octavo_attention_triton.backend import TritonAttention
from octavo_kv_fp8.formats import EightBits, Float8E4M3, Float8E5M2, Int8

MIXED = ((1, 1), (1, 37), (9, 50), (12, 12))
SCALES = torch.tensor([[0.02, 0.5], [0.03, 0.25]])
interpreted_only = pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU the kernels are compiled.")


def scaled(cls: type[EightBits]) -> type[Any]:
    """The format with scales that differ by head, and between keys and values, wherever none are given."""

    class Scaled(cls):  # type: ignore[misc, valid-type]
        def view(self, raw: torch.Tensor, scales: torch.Tensor | None = None) -> KVCache:
            return super().view(raw, SCALES.to(raw.device) if scales is None else scales)  # type: ignore[no-any-return]

    return Scaled


FORMATS = [scaled(cls) for cls in (Float8E4M3, Float8E5M2, Int8)]
NAMES = ["fp8", "fp8_e5m2", "int8"]


@pytest.mark.parametrize("cache_format", FORMATS, ids=NAMES)
@pytest.mark.parametrize("features", [{}, {"window": 11}, {"softcap": 4.0}])
def test_torch_reads_it(cache_format: type[Any], features: dict[str, Any]) -> None:
    spec = make_spec(num_heads=4, num_kv_heads=2, cache_format=cache_format, **features)
    check_attention(TorchAttention, make_case(spec, MIXED, padding_tokens=3), with_lse=True)


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cache_format", FORMATS, ids=NAMES)
def test_triton_reads_it(cache_format: type[Any], dtype: torch.dtype) -> None:
    spec = make_spec(num_heads=4, num_kv_heads=2, dtype=dtype, cache_format=cache_format)
    check_attention(TritonAttention, make_case(spec, MIXED), with_lse=True)


@interpreted_only
@pytest.mark.parametrize("spec", [{"window": 9}, {"head_dim": 80}, {"block_size": 32}], ids=str)
def test_triton_reads_int8_of_other_shapes(spec: dict[str, Any]) -> None:
    made = make_spec(num_heads=4, num_kv_heads=2, dtype=torch.float16, cache_format=FORMATS[2], **spec)
    check_attention(TritonAttention, make_case(made, MIXED))


@interpreted_only
@pytest.mark.parametrize("backend", [TorchAttention, TritonAttention])
@pytest.mark.parametrize("cache_format", FORMATS, ids=NAMES)
def test_what_a_step_computes_is_read_from_the_cache(backend: Any, cache_format: type[Any]) -> None:
    """Whole prompts too: the same keys in one step or in several must round alike."""

    class Eager(backend):  # type: ignore[misc]
        min_own_tokens = 1

    case = make_case(make_spec(dtype=torch.float16, cache_format=cache_format), [(40, 40)])
    other = tuple(torch.full_like(x, 3.0) for x in case.new)
    built, _ = build_attention(Eager, case.spec, None, "cpu")
    out = torch.full(case.q.shape, torch.nan, dtype=torch.float16)
    built.forward(built.plan(case.batch), case.q, case.kv, out, new=other)
    assert_right(case, out)


@pytest.mark.parametrize(
    ("cls", "capability", "reason"),
    [(Float8E4M3, (8, 0), "8.9"), (Float8E5M2, (8, 0), None), (Int8, (8, 0), None), (Int8, (7, 5), "8.0")],
)
def test_which_gpus_serve_it(cls: Any, capability: tuple[int, int], reason: str | None) -> None:
    spec = replace(make_spec(cache_format=cls), device=DeviceInfo("cuda", "A GPU", capability))
    found = TritonAttention.why_not(spec, None)
    assert found is None if reason is None else reason in str(found)


def test_a_moved_case_keeps_its_scales() -> None:
    case = make_case(make_spec(cache_format=Int8), [(1, 5)])
    kv = replace(case.kv, k_scale=SCALES[0], v_scale=SCALES[1])
    moved = replace(case, kv=kv).to("cpu").kv
    assert moved.k_scale is not None and torch.equal(moved.k_scale, SCALES[0])
    assert moved.v_scale is not None and torch.equal(moved.v_scale, SCALES[1])
