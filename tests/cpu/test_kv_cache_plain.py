"""The plain KV-cache format: pages, writes, reads, and slots that write nothing."""

import pytest
import torch
from octavo.kv_cache.interface import KVCache, KVSpec
from octavo.kv_cache.plain import PlainFormat

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_BLOCKS = 7


def make(dtype: torch.dtype, block_size: int = 8, head_dim: int = 16) -> tuple[PlainFormat, KVCache]:
    plain = PlainFormat(KVSpec(3, head_dim, block_size, dtype))
    return plain, plain.view(torch.full((NUM_BLOCKS, plain.page_bytes()), 0xFF, dtype=torch.uint8))


def test_a_page_is_keys_then_values() -> None:
    plain, kv = make(torch.bfloat16)
    assert plain.page_bytes() == 2 * 3 * 8 * 16 * 2
    assert kv.k.shape == kv.v.shape == (NUM_BLOCKS, 3, 8, 16)
    assert kv.k_scale is None and kv.v_scale is None
    kv.k[2], kv.v[2] = 1, 2
    page = kv.raw[2].view(torch.bfloat16)
    assert page[: page.numel() // 2].eq(1).all() and page[page.numel() // 2 :].eq(2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_what_is_written_is_read(dtype: torch.dtype, block_size: int) -> None:
    """From strided views, token by token in random order, over blocks in random order, bit for bit."""
    plain, kv = make(dtype, block_size)
    num_tokens = 2 * block_size + 3
    qkv = torch.randn(num_tokens, 4 + 3 + 3, 16).to(dtype)
    k, v = qkv[:, 4:7], qkv[:, 7:]
    blocks = torch.tensor([5, 1, 3], dtype=torch.int32)
    where = torch.arange(num_tokens)
    slots = blocks.long()[where // block_size] * block_size + where % block_size
    order = torch.randperm(num_tokens)
    plain.write(kv, k[order], v[order], slots[order])
    for n in (1, block_size, block_size + 1, num_tokens):
        for got, wanted in zip(plain.read(kv, blocks, n), (k, v), strict=True):
            assert got.dtype is torch.float32 and got.shape == (n, 3, 16)
            assert torch.equal(got, wanted[:n].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_touches_its_slots_only(dtype: torch.dtype) -> None:
    """Slot -1 may spoil the null block, and nothing else."""
    plain, kv = make(dtype)
    k, v = torch.randn(2, 4, 3, 16).to(dtype)
    plain.write(kv, k, v, torch.tensor([9, -1, 30, -1]))
    for pages, values in ((kv.k, k), (kv.v, v)):
        assert torch.equal(pages[1, :, 1], values[0])
        assert torch.equal(pages[3, :, 6], values[2])
    kv.raw.view(dtype).view(NUM_BLOCKS, 2, 3, 8, 16)[[1, 3], :, :, [1, 6]] = torch.nan
    assert kv.raw[1:].view(dtype).isnan().all()


def test_nothing_to_write_and_nothing_to_read() -> None:
    plain, kv = make(torch.float32)
    nothing = torch.empty(0, 3, 16)
    plain.write(kv, nothing, nothing, torch.empty(0, dtype=torch.int64))
    assert kv.raw.eq(0xFF).all()
    k, v = plain.read(kv, torch.tensor([1], dtype=torch.int32), 0)
    assert k.shape == v.shape == (0, 3, 16)


def test_reads_are_copies() -> None:
    plain, kv = make(torch.float32)
    kv.k[:], kv.v[:] = 1, 2
    k, v = plain.read(kv, torch.tensor([2], dtype=torch.int32), 8)
    k.zero_(), v.zero_()
    assert kv.k.eq(1).all() and kv.v.eq(2).all()


def test_why_not() -> None:
    assert PlainFormat.why_not(KVSpec(2, 64, 16, torch.float16), None) is None
    reason = PlainFormat.why_not(KVSpec(2, 64, 16, torch.int8), None)
    assert reason is not None and "floating" in reason and "int8" in reason
    reason = PlainFormat.why_not(KVSpec(2, 64, 24, torch.float16), None)
    assert reason is not None and "power of two" in reason and "24" in reason
