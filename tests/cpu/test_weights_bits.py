"""Codes of a few bits in words: round trips, and where each bit lies."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from octavo.weights.bits import pack_bits, packed_width, unpack_bits

BITS = st.integers(1, 8)


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """Bits, and a few rows of equally many codes."""
    bits, num_rows, width = draw(BITS), draw(st.integers(1, 3)), draw(st.integers(1, 100))
    row = st.lists(st.integers(0, (1 << bits) - 1), min_size=width, max_size=width)
    return bits, draw(st.lists(row, min_size=num_rows, max_size=num_rows))


def as_tensor(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8).view(len(rows), len(rows[0]))


@given(rows_of_codes())
def test_what_is_packed_comes_back(codes: tuple[int, list[list[int]]]) -> None:
    bits, rows = codes
    words = pack_bits(as_tensor(rows), bits)
    assert words.dtype is torch.int32 and words.is_contiguous()
    assert words.shape == (len(rows), packed_width(len(rows[0]), bits))
    found = unpack_bits(words, bits, len(rows[0]))
    assert found.dtype is torch.uint8
    assert found.tolist() == rows


@given(rows_of_codes())
def test_a_row_is_one_number_with_the_first_code_lowest(codes: tuple[int, list[list[int]]]) -> None:
    """Words one after the other, the first the lowest, hold sum(code_i 2^(i b)); what no code takes is 0."""
    bits, rows = codes
    for row, words in zip(rows, pack_bits(as_tensor(rows), bits).tolist(), strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words)) == number


@given(BITS, st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=12))
def test_any_words_can_be_read(bits: int, words: list[int]) -> None:
    """As many whole codes as the words have room for."""
    num_codes = 32 * len(words) // bits
    number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    wanted = [number >> (bits * place) & ((1 << bits) - 1) for place in range(num_codes)]
    assert unpack_bits(torch.tensor(words, dtype=torch.int32), bits, num_codes).tolist() == wanted


def test_codes_of_any_integer_type_and_layout() -> None:
    codes = torch.arange(96).view(32, 3).t() % 8
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(unpack_bits(pack_bits(codes.to(dtype), 3), 3, 32).long(), codes)


def test_three_axes() -> None:
    codes = torch.randint(0, 8, (2, 3, 45), dtype=torch.uint8)
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, 45), codes)
