"""`octavo compare`: shapes and batches by name, the numbers, the turns, the verdicts and the exit codes."""

import json
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from octavo.attention.interface import AttentionSpec, GraphSupport
from octavo.attention.torch_reference import TorchAttention
from octavo.cli import main
from octavo.device import DeviceInfo
from octavo.kv_cache.interface import KVCache
from octavo.ops.interface import OPS
from octavo.ops.torch_reference import TorchOps
from octavo.testing.attention import make_case
from octavo.testing.ceilings import Ceilings, measure_ceilings
from octavo_workbench.compare import attention, op_cases, ops, turns
from octavo_workbench.compare.outcome import Errors, Work, entries, misses, verdicts
from octavo_workbench.compare.sizes import SHAPES, NamedBatch, batch, batches, shape
from octavo_workbench.compare.turns import Contender, num_copies, time_in_turns
from octavo_workbench.estimates import median_estimate, percentile, speedup_estimate

CPU = DeviceInfo("cpu", "CPU")
SMALL = ["--shape", "4x2x64", "--dtype", "float32", "--device", "cpu", "--runs", "4"]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies and products: what they reach does not matter here."""
    monkeypatch.setattr("octavo.testing.ceilings._COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("octavo.testing.ceilings._MATMUL_SIZE", {"cpu": 64})


def test_shapes_by_name_and_by_size() -> None:
    assert shape("llama-70b") is SHAPES["llama-70b"]
    own = shape("9x3x64")
    assert (own.hidden_size, own.intermediate_size) == (576, 2016)
    assert (own.num_heads, own.num_kv_heads, own.head_dim) == (9, 3, 64)
    for text in ("llama", "32x8", "32x5x128", "0x1x64"):
        with pytest.raises(ArgumentTypeError, match="known are llama-8b"):
            shape(text)


def test_batches_by_name() -> None:
    assert batch("decode:3x20").requests == ((1, 20),) * 3
    assert batch("prefill:2x8").requests == ((8, 8),) * 2
    assert batch("mixed:2x30+1x9").requests == ((1, 30), (1, 30), (9, 9))
    assert [one.num_tokens for one in batches("decode:3x20, prefill:2x8")] == [3, 16]
    ragged = batch("ragged:40x100").requests
    assert ragged == batch("ragged:40x100").requests
    assert {n for n, _ in ragged} == {1} and len({m for _, m in ragged}) > 20 and max(m for _, m in ragged) <= 100
    assert len(batch("ragged").requests) == 64
    for text in ("decode", "decode:3", "mixed:2x30", "verify:2x3", "ragged:x"):
        with pytest.raises(ArgumentTypeError, match="is no batch"):
            batch(text)


def _spec(**features: Any) -> AttentionSpec:
    named = NamedBatch("it", ((1, 40), (1, 64), (6, 30)))
    return attention.spec_of(shape("4x2x64"), named, torch.float32, CPU, 16, features)


def test_attention_work_is_counted_by_hand() -> None:
    named = NamedBatch("it", ((1, 40), (3, 10)))
    spec = attention.spec_of(shape("4x2x64"), named, torch.float32, CPU, 16, {})
    assert (spec.max_requests, spec.max_tokens, spec.max_model_len) == (64, 1024, 2048)
    large = attention.spec_of(shape("4x2x64"), batch("decode:70x9000"), torch.float32, CPU, 16, {})
    assert (large.max_requests, large.max_tokens, large.max_model_len) == (70, 1024, 9000)
    work = attention.work_of(spec, named)
    assert work.num_bytes == 50 * 2 * 2 * 64 * 4 + 2 * 4 * 4 * 64 * 4
    assert work.num_flops == 4 * 4 * 64 * (40 + 8 + 9 + 10)
    windowed = attention.work_of(
        attention.spec_of(shape("4x2x64"), named, torch.float32, CPU, 16, {"window": 9}), named
    )
    assert windowed.num_bytes == (9 + 10) * 2 * 2 * 64 * 4 + 2 * 4 * 4 * 64 * 4
    assert windowed.num_flops == 4 * 4 * 64 * (9 + 8 + 9 + 9)


def test_the_graph_that_a_batch_needs() -> None:
    needed = [attention.graph_support_needed(batch(one)) for one in ("ragged", "prefill:2x9", "mixed:1x9+1x5")]
    assert needed == [GraphSupport.DECODE, GraphSupport.UNIFORM, GraphSupport.MIXED]


def test_attention_errors_are_in_units_of_the_tolerance() -> None:
    case = make_case(_spec(), [(1, 40), (1, 64), (6, 30)])
    good = attention.errors_of(case, case.expected.out.float())
    assert good.largest < 1
    wrong = case.expected.out.float()
    wrong[3, 1, 7] += 1
    assert attention.errors_of(case, wrong).largest > 1e3


class Slow(TorchAttention):
    """Off by 1%, and 20 ms late."""

    def forward(
        self,
        plan: Any,
        q: torch.Tensor,
        kv: KVCache,
        out: torch.Tensor,
        lse: torch.Tensor | None = None,
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        super().forward(plan, q, kv, out, lse, new)
        time.sleep(0.02)
        out *= 1.01


def test_attention_is_compared_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = attention.select

    def select(plugins: Any, name: str, spec: AttentionSpec) -> Any:
        found = chosen(plugins, "torch", spec)
        return found if name == "torch" else SimpleNamespace(cls=Slow, options=None)

    monkeypatch.setattr(attention, "select", select)
    path = tmp_path / "it.json"
    marks = ["--batch", "decode:4x700,mixed:2x30+1x17", "--max-error", "1", "--min-speedup", "0.9", "--json", str(path)]
    assert main(["compare", "attention", "torch", "slow", *SMALL, *marks]) == 1
    result = json.loads(path.read_text(encoding="utf-8"))
    first, second, third, _ = result["entries"]
    assert (first["case"], second["name"], third["case"]) == ("decode:4x700", "slow", "mixed:2x30+1x17")
    assert first["speedup"] is None and first["errors"]["largest"] < 1 < second["errors"]["largest"]
    assert second["speedup"]["value"] < 0.9 and second["seconds"]["value"] > 0.02
    assert len(first["samples"]) == 4
    seconds, rates = first["seconds"]["value"], first["rates"]
    assert rates["gb_per_s"] == pytest.approx(first["work"]["num_bytes"] / seconds / 1e9)
    assert rates["of_matmul"] == pytest.approx(rates["tflop_per_s"] * 1e12 / result["ceilings"]["flops_per_s"])
    text = capsys.readouterr().out
    assert "slow" in text and "times torch's speed" in text
    assert "missed: decode:4x700: slow errs by" in text
    assert "missed: decode:4x700: slow is 0." in text
    assert "torch errs" not in text


def test_ops_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "it.json"
    command = ["compare", "ops", "torch", "torch", *SMALL, "--batch", "decode:3x9", "--max-error", "1"]
    assert main([*command, "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))["entries"]
    assert [one["case"] for one in found[::2]] == [f"{op}, 3 tokens" for op in OPS]
    assert {one["name"] for one in found} == {"torch", "torch #2"}
    assert "torch #2" in capsys.readouterr().out


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_right_and_a_wrong_one_is_seen(op: str) -> None:
    case = op_cases.op_case(op, shape("4x2x64"), 5, torch.bfloat16, 16)
    before = [x.clone() for x in case.inputs]
    assert 0 < ops.errors_of(TorchOps(), case).largest <= 1
    assert all(torch.equal(one, two) for one, two in zip(case.inputs, before, strict=True))
    assert case.num_bytes > 0

    class Wrong(TorchOps):
        def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return super().rms_norm(x, weight, eps) * 1.02

        def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
            return super().silu_and_mul(x) * 1.02

        def rotary(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
            super().rotary(x, positions + 1, cos_sin)

    assert ops.errors_of(Wrong(), case).largest > 2


def test_turns_change_places_and_warm_up() -> None:
    calls: list[str] = []

    def launch(name: str) -> Callable[[int], None]:
        return lambda i: calls.append(f"{name}{i}")

    samples = time_in_turns([Contender("a", launch("a")), Contender("b", launch("b"))], 2, 3, "cpu")
    assert [len(one) for one in samples] == [3, 3]
    a, b = ["a0", "a1"], ["b0", "b1"]
    assert calls == [*b, *a, *a, *b, *b, *a, *a, *b, *b, *a]


def test_copies_keep_inputs_cold() -> None:
    assert num_copies("cpu", 10) == 1
    assert num_copies("cuda", turns.COLD_BYTES) == num_copies("cuda", 5 * turns.COLD_BYTES) == 1
    assert num_copies("cuda", turns.COLD_BYTES // 3) == 4
    assert num_copies("cuda", 1) == 256


def test_estimates() -> None:
    one = median_estimate([3.0, 1.0, 2.0, 4.0, 5.0] * 20)
    assert one.value == 3.0 and 2.0 <= one.low <= 3.0 <= one.high <= 4.0
    assert median_estimate([2.0]).scaled(1e3).high == 2000.0
    assert speedup_estimate([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]).value == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 50) == 3.0 and percentile([0.0, 10.0], 99) == pytest.approx(9.9)


def test_verdicts_tell_a_difference_from_noise() -> None:
    noisy, same = [1.0, 1.1, 0.9, 1.05, 0.95] * 6, [1.02, 0.93, 1.08, 0.97, 1.0] * 6
    quick = [0.5 * x for x in noisy]
    found = entries("it", ["a", "b", "c"], [Errors(0.1, 0.0)] * 3, [noisy, same, quick], Work(10, 10))
    said = verdicts(found, "a")
    assert "no difference between b and a" in said[0]
    assert "c is faster (2.00 times a's speed" in said[1]
    marks = SimpleNamespace(max_error=None, min_speedup=1.5)
    assert misses(found, marks) == [f"it: b is {found[1].speedup.value:.2f} times, not 1.5"]  # type: ignore[arg-type, union-attr]
    nan = entries("it", ["a"], [Errors(float("nan"), 0.0)], [noisy], Work(10, 10))
    assert misses(nan, SimpleNamespace(max_error=1.0, min_speedup=None))  # type: ignore[arg-type]


def test_ceilings_are_measured() -> None:
    ceilings = measure_ceilings("cpu", torch.float32)
    assert ceilings.bytes_per_s > 1e6 and ceilings.flops_per_s > 1e6
    assert str(Ceilings(4.29e12, 7.95e14, "bfloat16")) == "copy 4,290.0 GB/s, bfloat16 matmul 795.00 TFLOP/s"


def test_an_unknown_backend_is_refused_with_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "attention", "torch", "triangle", *SMALL]) in (
        1,
        2,
    )  # 1 where a failed plugin might have it
    assert "No attention backend is called 'triangle'. Known: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["attention", "torch"], "name at least two"),
        (["attention", "torch", "torch", "--batch", "decode"], "'decode' is no batch"),
        (["attention", "torch", "torch", "--dtype", "int8"], "--dtype is 'int8'"),
        (["ops", "torch", "torch", "--op", "gelu"], "--op names gelu, but the ops are rms_norm"),
        (["ops", "torch", "torch", "--json", "/nowhere/at/all.json"], "there is no directory /nowhere/at"),
        (["speed", "a", "b"], "invalid choice: 'speed'"),
    ],
)
def test_bad_arguments_are_refused(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *args]) == 2
    assert words in capsys.readouterr().err
