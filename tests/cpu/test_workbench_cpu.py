"""`octavo bench cpu`: two sides that take turns, on a tiny model with a tokenizer."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.errors import CheckpointError, EngineDeadError, OctavoError, StepError
from octavo_workbench.bench import cpu_worker, turns
from octavo_workbench.bench.cpu import Comparison, same_terms
from octavo_workbench.bench.cpu_worker import OctavoSide, TransformersSide
from octavo_workbench.bench.turns import OtherLoad, SideProcess, Turn
from octavo_workbench.workloads import fixed
from tiny_tokenizer import write_tokenizer

PROMPTS = [job.prompt_token_ids for job in fixed(3, 12, 1, vocab_size=256)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF directory of a random Llama whose end-of-sequence token is the one that it likes best."""
    path = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 30_000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, initializer_range=0.3))
    first = int(llama(torch.tensor(PROMPTS[:1])).logits[0, -1].argmax())
    llama.config.eos_token_id = llama.generation_config.eos_token_id = first
    llama.save_pretrained(path)
    return write_tokenizer(path)


@pytest.fixture(scope="module")
def config(model: Path) -> EngineConfig:
    """Both sides' configuration, in float32 so that they round alike."""
    return same_terms(EngineConfig(model=str(model), dtype="float32", device="cpu", max_num_seqs=4, progress=False))


def test_terms_are_the_same_for_both() -> None:
    terms = same_terms(EngineConfig(model="m"))
    assert (terms.dtype, terms.enable_prefix_caching, terms.model) == ("bfloat16", False, "m")
    assert same_terms(EngineConfig(dtype="float32")).dtype == "float32"


def test_both_sides_generate_the_same_past_the_end_of_sequence(config: EngineConfig) -> None:
    ours, theirs = (side(config).generate(PROMPTS, 8) for side in (OctavoSide, TransformersSide))
    assert ours == theirs
    assert [len(one) for one in ours] == [8, 8, 8]
    assert ours[0][0] == json.loads((Path(config.model) / "config.json").read_text())["eos_token_id"]


def test_transformers_reads_directories_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    monkeypatch.setattr("octavo.checkpoints.load_tokenizer", lambda config: (path, None, {}))
    with pytest.raises(CheckpointError, match="name an HF directory"):
        TransformersSide(EngineConfig(model=str(path), dtype="float32"))


class _Echo:
    """A side that gives every prompt back, `extra` tokens too many."""

    num_threads = 3
    extra = 0

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def generate(self, prompts: list[list[int]], num_output_tokens: int) -> list[list[int]]:
        return [prompt[: num_output_tokens + self.extra] for prompt in prompts]


def _serve(monkeypatch: pytest.MonkeyPatch, lines: list[dict[str, Any]], extra: int = 0) -> list[dict[str, Any]]:
    monkeypatch.setattr(_Echo, "extra", extra)
    monkeypatch.setitem(cpu_worker.SIDES, "echo", _Echo)
    answers = io.StringIO()
    cpu_worker.serve("echo", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_worker_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    question = {"prompts": [[5, 6, 7], [8, 9, 10]], "num_output_tokens": 2}
    ready, *answers = _serve(monkeypatch, [{"model": "m"}, question, question])
    assert ready == {"num_threads": 3}
    for answer in answers:
        turn = Turn(**answer)
        assert turn.token_ids == [[5, 6], [8, 9]]
        assert turn.output_tokens_per_s == pytest.approx(4 / turn.seconds)
        assert turn.peak_bytes > 10e6
        assert turn.idle_cpu_seconds >= 0


def test_a_worker_that_generates_another_number_of_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = _serve(monkeypatch, [{}, {"prompts": [[5, 6, 7]], "num_output_tokens": 2}], extra=1)
    assert "1 prompts should have got 2 tokens each, but there are 1 answers of [3] tokens" in answers[-1]["error"]


def test_a_turn_counts_answers_too() -> None:
    class Mute(_Echo):
        def generate(self, prompts: list[list[int]], num_output_tokens: int) -> list[list[int]]:
            return super().generate(prompts, num_output_tokens)[:1]

    with pytest.raises(StepError, match="2 prompts should have got 1 tokens each, but there are 1 answers"):
        cpu_worker.turn(Mute(EngineConfig()), [[5], [6]], 1)


def _turn(seconds: float, *firsts: int) -> Turn:
    tokens = [[first, 1] for first in firsts]
    return Turn(seconds=seconds, cpu_seconds=seconds, idle_cpu_seconds=0.0, peak_bytes=1, token_ids=tokens)


def test_speedup_is_the_median_of_pairs() -> None:
    ours = [_turn(1.0, 5, 6), _turn(4.0, 5, 6), _turn(2.0, 5, 6)]
    theirs = [_turn(2.0, 5, 6), _turn(20.0, 5, 7), _turn(6.0, 5, 6)]
    comparison = Comparison(2, ours, theirs)
    assert comparison.speedup == 3.0
    assert comparison.rates == pytest.approx((2.0, 4 / 6))
    assert comparison.same_first_token == pytest.approx(5 / 6)


def test_a_side_that_refuses_says_why(config: EngineConfig, tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match=r"The side 'octavo' cannot run: .*no model"):
        SideProcess("octavo", replace(config, model=str(tmp_path / "none")))


def test_a_side_that_ends_is_noticed(config: EngineConfig) -> None:
    with SideProcess("octavo", config) as side:
        assert side.ready_seconds > 0
        assert len(side.take_turn(PROMPTS[:1], 2).token_ids) == 1
        side._process.kill()
        with pytest.raises(EngineDeadError, match="side 'octavo' ended with code -9"):
            side.take_turn(PROMPTS[:1], 2)


def test_other_load_is_what_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, own, now = iter([100.0, 104.0]), iter([10.0, 13.0]), iter([50.0, 52.0])
    monkeypatch.setattr(turns, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(turns, "_own_seconds", lambda: next(own))
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert OtherLoad().share() == pytest.approx((4 - 3) / (2 * 2))


def test_other_load_is_unknown_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_busy_seconds", lambda: None)
    assert OtherLoad().share() is None


def test_the_benchmark_compares_and_judges(
    config: EngineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--requests", "1,2", "--prompt-tokens", "8", "--output-tokens", "4", "--runs", "1"]
    engine = [config.model, "--dtype", "float32", "--device", "cpu", "--max-num-seqs", "4", "--no-progress"]
    path = tmp_path / "cpu.json"
    assert main(["bench", "cpu", *engine, *sizes, "--min-speedup", "1e-6,1e6", "--json", str(path)]) == 1
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [one["num_requests"] for one in result["comparisons"]] == [1, 2]
    for one in result["comparisons"]:
        assert len(one["ours_seconds"]) == len(one["theirs_seconds"]) == 1
        assert one["same_first_token"] == 1.0
        assert one["speedup"] == pytest.approx(one["theirs_seconds"][0] / one["ours_seconds"][0])
    assert result["fresh"]["ready_seconds"] > 0
    assert result["fresh"]["peak_bytes"] > 50e6
    text = capsys.readouterr().out
    assert "missed: 2 at once" in text
    assert "missed: 1 at once" not in text
