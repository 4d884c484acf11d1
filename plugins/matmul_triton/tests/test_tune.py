"""What `tune` concludes from times, without a GPU."""

import pytest
import torch
from octavo_matmul_triton.tune import Timing, Weights, report, winners
from octavo_matmul_triton.tuning import TensorCore, Vector

FAST, SLOW = Vector(4), TensorCore(32, 64)


def cell(ours: float, cublas: float) -> list[Timing]:
    timings = [Timing(FAST, ours), Timing(SLOW, 2 * ours), Timing(None, cublas)]
    return sorted(timings, key=lambda timing: timing.us)


def test_a_rule_ends_where_cublas_is_as_fast() -> None:
    cells = [(1, cell(1.0, 2.0)), (2, cell(1.5, 2.0)), (4, cell(1.99, 2.0)), (8, cell(1.0, 2.0))]
    assert winners(cells) == {1: FAST, 2: FAST}
    assert winners([(1, cell(3.0, 2.0))]) == {}
    assert winners([(1, [Timing(None, 1.0)]), (2, cell(1.0, 2.0))]) == {}


def test_a_line_says_speed_and_winner(capsys: pytest.CaptureFixture[str]) -> None:
    weights = Weights([torch.zeros(1000, 500)], *(torch.zeros(1, 1),) * 3)
    row = report("down", weights, 2, cell(10.0, 20.0))
    line = capsys.readouterr().out
    assert "200 GB/s" in line and "100 GB/s" in line and "x2.000" in line and "Vector(block_n=4" in line
    assert row["timings"][0] == {
        "config": {"kind": "Vector", "block_n": 4, "num_warps": 4, "unroll": 1, "prefetch": 0},
        "us": 10.0,
    }
    assert row["timings"][1]["config"] is None or row["timings"][2]["config"] is None
