"""`octavo bench` on a tiny model with random weights: what it prints, writes and exits with."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.engine.step import EngineStats
from octavo.errors import StepError
from octavo_workbench import workloads
from octavo_workbench.bench.kv_waste import WasteGauge
from octavo_workbench.bench.offline import measure
from octavo_workbench.report import table
from octavo_workbench.session import Session
from octavo_workbench.workloads import SHAPES, Job, fixed, model_of_shape

TINY = ["--shape", "tiny", "--device", "cpu", "--max-num-seqs", "8", "--no-progress"]


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small copies and products: what they reach does not matter here."""
    monkeypatch.setattr("octavo.testing.ceilings._COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("octavo.testing.ceilings._MATMUL_SIZE", {"cpu": 64})


@pytest.fixture
def session() -> Iterator[Session]:
    """An engine with the tiny shape."""
    with model_of_shape(SHAPES["tiny"]) as folder:
        config = EngineConfig(model=folder, load_format="dummy", device="cpu", max_num_seqs=8, progress=False)
        with Session(config) as session:
            yield session


def _bench(path: Path, *args: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a benchmark of the tiny shape."""
    code = main(["bench", *args, *TINY, "--json", str(path / "result.json")])
    return code, json.loads((path / "result.json").read_text(encoding="utf-8"))


def test_offline_measures_the_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = _bench(tmp_path, "offline", "--workload", "3x20x4,2x9x3", "--runs", "2")
    assert code == 0
    first, second = result["workloads"]
    assert (first["workload"], second["workload"]) == ("3x20x4", "2x9x3")
    assert [run["num_output_tokens"] for run in second["runs"]] == [6, 6]
    assert len(first["runs"]) == 2
    for run in first["runs"]:
        assert (run["num_prompt_tokens"], run["num_output_tokens"], run["num_cached_tokens"]) == (60, 12, 0)
    fastest = min(run["seconds"] for run in first["runs"])
    assert first["output_tokens_per_s"] == pytest.approx(12 / fastest)
    assert first["tokens_per_s"] == pytest.approx(72 / fastest)
    floor, ceilings = first["floor"], result["ceilings"]
    assert floor["num_steps"] == 4
    assert first["of_floor"] == pytest.approx(floor["seconds"] / fastest)
    assert 0 < first["of_floor"] < 1
    assert first["of_copy"] == pytest.approx(floor["num_bytes"] / fastest / ceilings["bytes_per_s"])
    weights = result["engine"]["memory"]["weights"]  # the embedding is read, for the logits
    assert floor["num_bytes"] == pytest.approx(
        4 * weights + 3 * (20 + 21 + 22 + 23) * result["engine"]["kv_bytes_per_token"]
    )
    assert result["engine"]["model"] == "tiny"
    assert result["engine"]["backends"]
    assert result["environment"]["versions"]["torch"]
    text = capsys.readouterr().out
    assert "% of floor" in text and "ceilings: copy" in text


def test_offline_runs_the_first_requests_only(tmp_path: Path) -> None:
    _, result = _bench(tmp_path, "offline", "--num-requests", "2", "--runs", "1")
    first = workloads.sharegpt_like(2)
    assert result["workloads"][0]["runs"][0]["num_output_tokens"] == sum(job.num_output_tokens for job in first)


def test_offline_fails_when_prompts_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(workloads.WORKLOADS, "twice", lambda: fixed(1, 64, 2) * 2)
    code, result = _bench(tmp_path, "offline", "--workload", "twice", "--runs", "1", "--max-num-batched-tokens", "64")
    assert code == 1
    assert result["workloads"][0]["runs"][0]["num_cached_tokens"] == 48
    assert "came from the prefix cache" in capsys.readouterr().out


def test_prefix_finds_all_full_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = _bench(tmp_path, "prefix", "--prompt-tokens", "128", "--runs", "2")
    assert code == 0
    assert [one["num_cached_tokens"] for one in result["prompts"]] == [112, 112]
    assert f"{result['speedup']:.1f} times shorter" in capsys.readouterr().out


def test_prefix_misses_an_unreachable_mark(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["prefix", "--prompt-tokens", "64", "--runs", "1", "--min-speedup", "1e6"]
    assert main(["bench", *args, *TINY]) == 1
    assert "missed: " in capsys.readouterr().out


def test_prefix_needs_the_prefix_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefix", *TINY, "--no-enable-prefix-caching"]) == 2
    assert "leave out --no-enable-prefix-caching" in capsys.readouterr().err


def _expected_waste(jobs: list[Job], slots: Callable[[int], int]) -> float:
    """The mean over steps, from the lengths alone; `slots` are those that a request of some tokens holds.

    After step t a request that goes on holds its prompt and t - 1 tokens more.
    """
    shares = []
    for t in range(1, max(job.num_output_tokens for job in jobs)):
        held = [len(job.prompt_token_ids) + t - 1 for job in jobs if job.num_output_tokens > t]
        shares.append(1 - sum(held) / sum(map(slots, held)))
    return sum(shares) / len(shares)


def test_kv_waste_is_what_the_lengths_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steady = SimpleNamespace(perf_counter=itertools.count(1.0).__next__)  # each step takes a second
    monkeypatch.setattr("octavo_workbench.session.time", steady)
    jobs = [*fixed(1, 20, 9, seed=1), *fixed(1, 33, 30, seed=2), *fixed(1, 7, 40, seed=3)]
    monkeypatch.setattr("octavo_workbench.bench.kv_waste.sharegpt_like", lambda count: jobs[:count])
    code, result = _bench(tmp_path, "kv-waste", "--num-requests", "3", "--block-sizes", "16,64", "--max-waste", "1e-9")
    small, large = result["block_sizes"]
    assert (small["block_size"], large["block_size"]) == (16, 64)
    assert small["mean_over_time"] == pytest.approx(_expected_waste(jobs, lambda held: -(-held // 16) * 16))
    assert large["mean_over_time"] == pytest.approx(_expected_waste(jobs, lambda held: -(-held // 64) * 64))
    assert large["if_reserved"] == pytest.approx(_expected_waste(jobs, lambda held: 2048))
    assert code == 1
    assert "at block size 16, not 1e-09%" in capsys.readouterr().out


def test_waste_is_weighted_with_time() -> None:
    gauge = WasteGauge()
    gauge(5.0, EngineStats(kv_slots=64, kv_tokens=40, num_running=1))  # a prompt's first part: nothing generated
    gauge(1.0, EngineStats(kv_slots=16, kv_tokens=12, num_running=1, num_generated_tokens=1))
    gauge(3.0, EngineStats(kv_slots=32, kv_tokens=32, num_running=2, num_generated_tokens=3))
    gauge(9.0, EngineStats(num_generated_tokens=5))  # all have ended
    assert (gauge.num_steps, gauge.seconds) == (2, 4.0)
    assert gauge.wasted / gauge.seconds == pytest.approx(0.25 / 4)
    assert gauge.token_seconds / gauge.slot_seconds == pytest.approx((12 + 96) / (16 + 96))
    assert gauge.wasted_reserved / gauge.seconds == pytest.approx((1 - 12 / 2048 + 3 * (1 - 32 / 4096)) / 4)


def test_each_run_begins_with_an_empty_cache(session: Session) -> None:
    runs = measure(session, fixed(2, 64, 2), 2)
    assert [run.num_cached_tokens for run in runs] == [0, 0]
    assert session.run(fixed(2, 64, 2)).num_cached_tokens == 2 * 48


def test_a_request_that_fails_ends_the_run(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(step: object) -> object:
        raise RuntimeError("the kernel is broken")

    monkeypatch.setattr(session.engine._executor, "submit", submit)
    with pytest.raises(StepError, match="the kernel is broken"):
        session.run([Job([10, 11], 2)])


def test_observers_see_every_step(session: Session) -> None:
    seen: list[tuple[float, int]] = []
    run = session.run(fixed(2, 20, 3), observe=lambda seconds, stats: seen.append((seconds, stats.num_steps)))
    assert len(seen) == run.num_steps == 3
    assert [steps for _, steps in seen] == [seen[0][1] + i for i in range(3)]
    assert 0 < sum(seconds for seconds, _ in seen) <= run.seconds


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["offline", "--runs", "0"], "'0' is not a whole number above 0"),
        (["kv-waste", "--block-sizes", "16,x"], "'x' is not a whole number above 0"),
        (["prefix", "--min-speedup", "inf"], "'inf' is not a number above 0"),
        (["cpu", "--min-speedup", "2,fast,2"], "'fast' is not a number above 0"),
        (["cpu", "--min-speedup", "2.1"], "--min-speedup has 1 numbers for 3 of --requests"),
        (["offline", "--workload", "decode"], "There is no workload 'decode'"),
        (["offline", "MODEL", "--shape", "tiny"], "leave one out"),
        (["offline", "--json", "/nowhere/at/all.json"], "there is no directory /nowhere/at"),
        (["speed"], "invalid choice: 'speed'"),
        ([], "required"),
    ],
)
def test_bad_arguments_are_refused(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cpu", "offline", "startup", "kv-waste", "prefix"])
def test_help_names_the_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json FILE" in text
    assert "--attention-backend" in text


def test_tables_are_aligned() -> None:
    lines = table(["name", "tok/s"], [["a", 1234.56], ["long name", 2], ["b", 0.5]]).splitlines()
    assert lines == ["     name    tok/s", "        a  1,234.6", "long name        2", "        b     0.50"]
