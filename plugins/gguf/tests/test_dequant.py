"""Decoding of blocks, against what llama.cpp's own library reads from the same bytes."""

from pathlib import Path

import pytest
import torch
from octavo_gguf import dequant
from octavo_gguf.types import BLOCK_TYPES
from safetensors.torch import load_file

BLOCKS = load_file(Path(__file__).parent / "data" / "blocks.safetensors")
CASES = sorted({name.rsplit(".", 1)[0] for name in BLOCKS})
BY_NAME = {block.name: block for block in BLOCK_TYPES.values()}


def test_every_quantized_type_has_golden_blocks() -> None:
    assert {case.split(".")[0] for case in CASES} == {b.name for b in BLOCK_TYPES.values() if b.quantized}
    assert {case.split(".")[0] for case in CASES} == set(dequant.DECODERS)


@pytest.mark.parametrize("case", CASES)
def test_blocks_decode_bit_for_bit(case: str) -> None:
    found = dequant.dequantize(BLOCKS[f"{case}.blocks"], BY_NAME[case.split(".")[0]])
    wanted = BLOCKS[f"{case}.dequant"]
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCKS["Q6_K.model.blocks"]
    whole = dequant.dequantize(blocks, BY_NAME["Q6_K"])
    monkeypatch.setattr(dequant, "CHUNK_VALUES", 5 * 256)  # 24 blocks: the last chunk is not full
    assert torch.equal(dequant.dequantize(blocks, BY_NAME["Q6_K"]), whole)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_are_viewed_in_place(name: str) -> None:
    values = torch.randn(3, 4).to(dequant.PLAIN[name])
    rows = values.view(torch.uint8)
    found = dequant.dequantize(rows, BY_NAME[name])
    assert torch.equal(found, values)
    assert found.data_ptr() == values.data_ptr()
    assert dequant.output_dtype(BY_NAME[name]) == values.dtype
