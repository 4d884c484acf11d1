"""The hook module, the rules, and what the provider says it cannot serve, without Triton or a GPU."""

import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module

import pytest
import torch
from octavo.device import DeviceInfo
from octavo.weights.canonical import Dense
from octavo.weights.interface import MatmulSpec
from octavo.weights.torch_matmul import TorchMatmul
from octavo_matmul_triton import plugin
from octavo_matmul_triton.candidates import SHAPES, TOKENS, candidates
from octavo_matmul_triton.matmul import TritonMatmul
from octavo_matmul_triton.tuning import PINNED, Rule, TensorCore, Vector, default_rule, rule_for

H200 = DeviceInfo("cuda", "NVIDIA H200", (9, 0))
SPEC = MatmulSpec(weight=Dense, in_features=4096, out_features=100, dtype=torch.bfloat16, device=H200)


@dataclass(frozen=True)
class Packed:
    """A weight that no dense matmul knows."""


def test_the_provider_names_the_class() -> None:
    (provider,) = plugin.octavo_matmuls()
    module, name = str(provider.factory).split(":")
    assert provider.name == "triton" and getattr(import_module(module), name) is TritonMatmul
    assert (TritonMatmul.handles, TritonMatmul.layout) == ((Dense,), TorchMatmul.layout)


def test_the_hook_imports_nothing_heavy() -> None:
    code = "import sys, octavo_matmul_triton.plugin; assert not {'torch', 'triton'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(spec: MatmulSpec) -> str:
        return TritonMatmul.why_not(spec, None) or ""

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("octavo_matmul_triton.matmul.find_spec", lambda name: name)
    assert [reason(replace(SPEC, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [""] * 3
    assert "float64" in reason(replace(SPEC, dtype=torch.float64))
    assert "Packed" in reason(replace(SPEC, weight=Packed))
    assert "24" in reason(replace(SPEC, in_features=24))
    assert "TRITON_INTERPRET" in reason(replace(SPEC, device=DeviceInfo("cpu", "CPU")))
    assert "7.5" in reason(replace(SPEC, device=DeviceInfo("cuda", "T4", (7, 5))))
    assert "xpu" in reason(replace(SPEC, device=DeviceInfo("xpu", "GPU")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason(replace(SPEC, device=DeviceInfo("cpu", "CPU"))) == ""
    monkeypatch.setattr("octavo_matmul_triton.matmul.find_spec", lambda name: None)
    assert "not installed" in reason(SPEC)


ALL_RULES = [
    *(rule for shapes in PINNED.values() for rule in shapes.values()),
    *(default_rule(*shape) for shape in ((1, 16), (1536, 576), *SHAPES.values())),
]


@pytest.mark.parametrize("rule", ALL_RULES)
def test_a_rule_has_every_number_of_tokens_up_to_its_largest(rule: Rule) -> None:
    assert list(rule) == [1 << i for i in range(len(rule))]


def test_pinned_rules_are_for_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {1: TensorCore(32, 64)}
    monkeypatch.setitem(PINNED, 99, {(48, 32): pinned})
    assert rule_for(99, 48, 32, torch.bfloat16) == pinned
    assert rule_for(99, 48, 4096, torch.float32) == rule_for(98, 48, 4096, torch.bfloat16) == default_rule(48, 4096)


def test_narrow_weights_have_the_same_bits_for_any_number_of_tokens() -> None:
    """One and two tokens go the way of more: through tensor cores, K in one go. (Wide ones are faster otherwise.)"""
    for dtype in (torch.bfloat16, torch.float16):
        rule = rule_for(9, 576, 1536, dtype)
        assert set(rule) == {1, 2} and all(isinstance(one, TensorCore) and one.splits == 1 for one in rule.values())
    assert all(isinstance(one, Vector) for one in rule_for(9, 576, 1536, torch.float32).values())


@pytest.mark.parametrize("tokens", TOKENS)
def test_candidates_fit_the_kernels(tokens: int) -> None:
    """Each is there once; rows are dealt to threads evenly, and powers of two."""
    tried = candidates(tokens)
    assert len(set(tried)) == len(tried)
    for config in tried:
        assert 32 * config.num_warps % config.block_n == 0
        assert isinstance(config, Vector) == (tokens <= 4) or tokens == 8
