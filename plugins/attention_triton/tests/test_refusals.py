"""What the backend refuses, in one sentence each; its sizes; its options and its hook."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from octavo.batch import BatchShape
from octavo.device import DeviceInfo
from octavo.errors import StepError
from octavo.testing.attention import build_attention, make_case, make_spec
from octavo_attention_triton import plugin
from octavo_attention_triton.backend import TritonAttention
from octavo_attention_triton.options import TritonAttentionOptions
from octavo_attention_triton.sizes import Sizes
from octavo_attention_triton.tuning import TABLE, tuning_for

HOPPER = DeviceInfo("cuda", "H100", (9, 0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": DeviceInfo("cuda", "V100", (7, 0))}, "8.0"),
        ({"device": DeviceInfo("cuda", "A100", (8, 0)), "kv_layout": "fp8"}, "8.9"),
        ({"device": DeviceInfo("xpu", "Arc")}, "NVIDIA"),
        ({"dtype": torch.float64}, "float64"),
        ({"head_dim": 72}, "72"),
        ({"head_dim": 512}, "512"),
        ({"block_size": 4}, "not of 4"),
        ({"block_size": 256}, "not of 256"),
        ({"num_heads": 129, "num_kv_heads": 1}, "129"),
    ],
)
def test_refusals_name_what_they_refuse(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(TritonAttention.why_not(replace(make_spec(device=HOPPER), **changes), None))


def test_what_it_serves() -> None:
    assert TritonAttention.why_not(make_spec(device=HOPPER), None) is None


def test_a_cpu_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "CPU" in str(TritonAttention.why_not(make_spec(), None))


def test_bytes_grow_with_splits_and_requests() -> None:
    spec = make_spec(device=HOPPER)
    few, many = (TritonAttention.scratch_bytes(spec, TritonAttentionOptions(splits=n)) for n in (2, 8))
    assert many == 4 * few
    more = replace(spec, max_requests=128)
    assert TritonAttention.persistent_bytes(more, None) > TritonAttention.persistent_bytes(spec, None)


def test_batches_beyond_the_spec_are_refused() -> None:
    case = make_case(make_spec(), [(1, 4)])
    backend, _ = build_attention(TritonAttention, case.spec, None, "cpu")
    with pytest.raises(StepError, match="65 requests"):
        backend.plan(replace(case.batch, shape=BatchShape(65, 65, 1, 65)))


@pytest.mark.parametrize("requests", [1, 7, 64])
@pytest.mark.parametrize("splits", [None, 3])
def test_bounds_of_units_hold_for_the_worst_batch(requests: int, splits: int | None) -> None:
    sizes = Sizes.of(make_spec(device=HOPPER), TritonAttentionOptions(splits=splits))
    decode = sizes.decodes[sizes.decode_index(requests)]
    for work in (1, 5, 100, 10_000):
        tiles = [work] + [1] * (requests - 1)
        chunk = max(-(-sum(tiles) // decode.budget), decode.min_chunk)
        if 2 * requests <= decode.budget:
            chunk *= 2  # the size that is sure to keep to the budget
        units = sum(-(-n // chunk) if splits is None else min(n, splits) for n in tiles)
        assert units <= sizes.max_units(requests)


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_every_shape_has_a_row(capability: tuple[int, int], itemsize: int, head_dim: int) -> None:
    assert tuning_for(capability, head_dim, itemsize) in [row.tuning for row in TABLE]


def test_every_batch_has_decode_settings() -> None:
    """The last settings of a row serve any number of requests, those before it fewer and fewer."""
    for row in TABLE:
        *bounds, last = [one.max_pairs for one in row.tuning.decodes]
        assert last == 0 and all(bounds) and bounds == sorted(bounds)


@pytest.mark.parametrize("name", ["splits", "min_keys"])
def test_options_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        TritonAttentionOptions(**{name: 0})


def test_the_provider_names_the_backend() -> None:
    (provider,) = plugin.octavo_attention_backends()
    assert (provider.name, provider.priority, provider.options) == ("triton", 20, TritonAttentionOptions)
    module, name = str(provider.factory).split(":")
    assert getattr(import_module(module), name) is TritonAttention


def test_neither_hook_nor_refusal_imports_triton() -> None:
    code = (
        "import sys, octavo_attention_triton.plugin; assert 'torch' not in sys.modules;"
        "from octavo.testing.attention import make_spec; from octavo_attention_triton.backend import TritonAttention;"
        "TritonAttention.why_not(make_spec(), None); assert 'triton' not in sys.modules"
    )
    path = ":".join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


def test_the_smallest_limits_leave_room_to_warm_up() -> None:
    spec = replace(make_spec(), max_requests=1, max_tokens=1)
    scratch = torch.zeros(TritonAttention.scratch_bytes(spec, None), dtype=torch.uint8)
    TritonAttention(spec, None, scratch).warmup([BatchShape(1, 1, 1, 1)])
    kept = TritonAttention.persistent_bytes(spec, None)
    assert kept == TritonAttention.persistent_bytes(replace(spec, max_requests=2, max_tokens=3), None)
