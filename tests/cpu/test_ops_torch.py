"""What the fused operators' references promise beyond the interface, which test_ops_kit.py holds them to."""

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.ops.interface import OPS, OpSpec
from octavo.ops.torch_reference import TorchOps
from octavo.testing.ops import rotary_table

ops = TorchOps()


def test_rotary_keeps_what_attention_depends_on() -> None:
    """Products of queries and keys depend on distances only."""
    cos_sin, x = rotary_table(300, 64), torch.randn(1, 1, 64)
    k = x.flip(-1)
    products = []
    for base in (5, 200):
        one, two = x.clone(), k.clone()
        ops.rotary(one, torch.tensor([base + 40], dtype=torch.int32), cos_sin)
        ops.rotary(two, torch.tensor([base], dtype=torch.int32), cos_sin)
        products.append((one * two).sum().item())
    assert products[0] == pytest.approx(products[1], rel=1e-4)


def test_why_not() -> None:
    cpu = DeviceInfo("cpu", "CPU")
    assert set(OPS) == ops.ops
    assert [TorchOps.why_not(OpSpec(op, torch.bfloat16, cpu), None) for op in OPS] == [None] * len(OPS)
    reason = TorchOps.why_not(OpSpec("gelu", torch.bfloat16, cpu), None)
    assert reason is not None and "gelu" in reason
