"""The hook module, and what the provider says it cannot serve, without Triton or a GPU."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.ops.interface import OPS, OpSpec
from octavo_ops_triton import plugin
from octavo_ops_triton.ops import TritonOps

H200 = DeviceInfo("cuda", "NVIDIA H200", (9, 0))


def test_the_provider_names_the_class() -> None:
    (provider,) = plugin.octavo_fused_ops()
    module, name = str(provider.factory).split(":")
    assert provider.name == "triton" and getattr(import_module(module), name) is TritonOps
    assert TritonOps.ops == set(OPS)


def test_the_hook_imports_nothing_heavy() -> None:
    code = "import sys, octavo_ops_triton.plugin; assert not {'torch', 'triton'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: DeviceInfo, op: str = "rotary") -> str:
        return TritonOps.why_not(OpSpec(op, torch.bfloat16, device), None) or ""

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("octavo_ops_triton.ops.find_spec", lambda name: name)
    assert [reason(H200, op) for op in OPS] == [""] * len(OPS)
    assert "gelu" in reason(H200, "gelu")
    assert "TRITON_INTERPRET" in reason(DeviceInfo("cpu", "CPU"))
    assert "7.5" in reason(DeviceInfo("cuda", "T4", (7, 5)))
    assert "xpu" in reason(DeviceInfo("xpu", "GPU"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(DeviceInfo("cpu", "CPU")) == ""
    monkeypatch.setattr("octavo_ops_triton.ops.find_spec", lambda name: None)
    assert "not installed" in reason(H200)
