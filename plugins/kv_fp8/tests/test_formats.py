"""The 8-bit formats: pages, round trips within each code's step, clipping and its counts, and what they offer."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kv_cache.interface import KVCache, KVSpec
from octavo_kv_fp8 import plugin
from octavo_kv_fp8.formats import EightBits, Float8E4M3, Float8E5M2, Int8

FORMATS = (Float8E4M3, Float8E5M2, Int8)
NUM_BLOCKS, HEADS, HEAD_DIM = 7, 3, 16
# A step relative to the value (half of the spacing of codes), and the smallest step, in units of the scale.
STEPS = {Float8E4M3: (2**-4, 2**-10), Float8E5M2: (2**-3, 2**-17), Int8: (0.0, 0.5)}


def make(
    cls: type[EightBits], scales: torch.Tensor | None = None, block_size: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[EightBits, KVCache]:
    built = cls(KVSpec(HEADS, HEAD_DIM, block_size, dtype))
    raw = torch.full((NUM_BLOCKS, built.page_bytes()), 0xFF, dtype=torch.uint8)
    return built, replace(built.view(raw, scales), counts=torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("cls", FORMATS)
def test_a_page_is_keys_then_values_of_a_byte_each(cls: type[EightBits]) -> None:
    built, kv = make(cls, torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    assert built.page_bytes() == 2 * HEADS * 8 * HEAD_DIM
    assert kv.k.shape == kv.v.shape == (NUM_BLOCKS, HEADS, 8, HEAD_DIM)
    assert kv.k.dtype is cls.dtype
    assert kv.k_scale is not None and kv.k_scale.tolist() == [1, 2, 3]
    assert kv.v_scale is not None and kv.v_scale.tolist() == [4, 5, 6]
    kv.k.view(torch.uint8)[2], kv.v.view(torch.uint8)[2] = 1, 2
    first, second = kv.raw[2].chunk(2)
    assert first.eq(1).all() and second.eq(2).all()


@settings(deadline=None, max_examples=40)
@given(
    cls=st.sampled_from(FORMATS),
    block_size=st.sampled_from([8, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    powers=st.lists(st.integers(-8, 4), min_size=2 * HEADS, max_size=2 * HEADS),
    seed=st.integers(0, 1000),
)
def test_what_is_written_is_read_within_a_step(
    cls: type[EightBits], block_size: int, dtype: torch.dtype, powers: list[int], seed: int
) -> None:
    """From strided views, in random order over blocks in random order; each head has a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    largest = torch.tensor([2.0**power for power in powers]).view(2, HEADS)
    scales = cls.codes.scales(largest)
    built, kv = make(cls, scales, block_size, dtype)
    num_tokens = 2 * block_size + 3
    qkv = torch.rand(num_tokens, 4 + 2 * HEADS, HEAD_DIM, generator=generator) * 2 - 1
    qkv[:, 4:] *= largest.view(-1, 1)
    k, v = qkv.to(dtype)[:, 4:].split(HEADS, dim=1)
    blocks, where = torch.tensor([5, 1, 3], dtype=torch.int32), torch.arange(num_tokens)
    slots = blocks.long()[where // block_size] * block_size + where % block_size
    order = torch.randperm(num_tokens, generator=generator)
    built.write(kv, k[order], v[order], slots[order])
    relative, smallest = STEPS[cls]
    for got, wanted, scale in zip(built.read(kv, blocks, num_tokens), (k, v), scales, strict=True):
        assert got.dtype is torch.float32
        step = wanted.float().abs() * relative + smallest * scale.view(-1, 1)
        assert ((got - wanted.float()).abs() <= step * (1 + 1e-5)).all()
    assert kv.counts is not None and kv.counts.tolist() == [0, 2 * HEADS * HEAD_DIM * num_tokens]


@pytest.mark.parametrize("cls", FORMATS)
def test_values_that_codes_hold_are_exact(cls: type[EightBits]) -> None:
    """All 256 codes but NaN and infinities come back as they are, times the scale."""
    scales = torch.full((2, HEADS), 0.5)
    built, kv = make(cls, scales)
    codes = torch.arange(256, dtype=torch.uint8).view(cls.dtype).float()
    codes = codes[codes.abs() <= cls.codes.largest]
    values = torch.nn.functional.pad(codes, (0, -len(codes) % (HEADS * HEAD_DIM))).view(-1, HEADS, HEAD_DIM) * 0.5
    slots = torch.arange(8, 8 + len(values))
    built.write(kv, values, -values, slots)
    k, v = built.read(kv, torch.tensor([1]), len(values))
    assert torch.equal(k, values) and torch.equal(v, -values)
    assert len(codes) >= 247


@pytest.mark.parametrize("cls", FORMATS)
def test_values_beyond_the_range_are_clipped_and_counted(cls: type[EightBits]) -> None:
    """Exactly those beyond it, of tokens that have a slot; infinities too."""
    largest = cls.codes.largest
    built, kv = make(cls, torch.full((2, HEADS), 2.0))
    k, v = torch.zeros(2, 3, HEADS, HEAD_DIM)
    k[0, 0, :4] = torch.tensor([2 * largest, -2 * largest, 2.1 * largest, -float("inf")])
    v[1, 2, 5] = 9 * largest
    k[2] = v[2] = 100 * largest  # a token that is nobody's
    built.write(kv, k, v, torch.tensor([8, 9, -1]))
    assert kv.counts is not None and kv.counts.tolist() == [3, 2 * 2 * HEADS * HEAD_DIM]
    got, its_v = built.read(kv, torch.tensor([1]), 2)
    assert got[0, 0, :4].tolist() == [2 * largest, -2 * largest, 2 * largest, -2 * largest]
    assert its_v[1, 2, 5] == 2 * largest
    built.write(kv, k, v, torch.tensor([-1, -1, -1]))
    assert kv.counts.tolist() == [3, 2 * 2 * HEADS * HEAD_DIM]


@pytest.mark.parametrize("cls", FORMATS)
def test_a_write_touches_its_slots_only(cls: type[EightBits]) -> None:
    """Slot -1 may spoil the null block, and nothing else."""
    built, kv = make(cls)
    k, v = torch.rand(2, 4, HEADS, HEAD_DIM) + 1
    before = kv.raw.clone()
    built.write(kv, k, v, torch.tensor([9, -1, 30, -1]))
    changed = (kv.raw != before).view(NUM_BLOCKS, 2, HEADS, 8, HEAD_DIM)[1:]
    assert changed[0, :, :, 1].all() and changed[2, :, :, 6].all()
    changed[0, :, :, 1] = changed[2, :, :, 6] = False
    assert not changed.any()


@pytest.mark.parametrize("cls", FORMATS)
def test_nothing_to_write_and_nothing_to_read(cls: type[EightBits]) -> None:
    built, kv = make(cls)
    nothing = torch.empty(0, HEADS, HEAD_DIM)
    built.write(kv, nothing, nothing, torch.empty(0, dtype=torch.int64))
    assert kv.raw.eq(0xFF).all() and kv.counts is not None and kv.counts.tolist() == [0, 0]
    assert built.read(kv, torch.tensor([1]), 0)[0].shape == (0, HEADS, HEAD_DIM)


def test_scales_of_the_largest_values() -> None:
    """A head without values has a scale all the same."""
    scales = Int8.codes.scales(torch.tensor([127.0, 0.0]))
    assert scales.tolist() == [1.5, 1.0]


def test_why_not() -> None:
    assert Float8E4M3.why_not(KVSpec(2, 64, 16, torch.float16), None) is None
    assert "fp8_e5m2" in str(Float8E5M2.why_not(KVSpec(2, 64, 24, torch.float16), None))
    assert "torch.int8" in str(Int8.why_not(KVSpec(2, 64, 16, torch.int8), None))


def test_the_providers_name_the_formats() -> None:
    """fp8_e4m3 is fp8, and none of them comes before a format that keeps values as they are."""
    offered = plugin.octavo_kv_cache_formats()
    assert [one.name for one in offered] == ["fp8", "fp8_e4m3", "fp8_e5m2", "int8"]
    assert all(one.priority < 0 for one in offered)
    classes = []
    for one in offered:
        module, name = str(one.factory).split(":")
        classes.append(getattr(import_module(module), name))
    assert classes == [Float8E4M3, Float8E4M3, Float8E5M2, Int8]
    assert [one.layout for one in classes] == ["fp8", "fp8", "fp8_e5m2", "int8"]
