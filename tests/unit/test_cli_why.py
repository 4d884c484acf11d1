"""`octavo plugins why`: the selections for a model that is only a config.json, here and on another GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
from octavo.cli import main

pytest.importorskip("torch")  # the engine's own selection needs it

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path)


def why(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plugins", "why", *arguments, "--load-format", "dummy", "--plugins", ""])
    return code, *capsys.readouterr()


def test_every_candidate_is_chosen_or_has_a_reason(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = why(capsys, model, "--device", "cpu", "--json")
    assert code == 0, err
    selections: list[dict[str, Any]] = json.loads(out)
    by_kind = {one["kind"]: one for one in selections}
    assert by_kind["attention"]["name"] in ("native", "torch"), "native where there is a C compiler"
    assert {"executor", "weights", "kv_cache", "ops", "matmul", "communicator"} <= set(by_kind)
    for selection in selections:
        chosen = [one["name"] for one in selection["candidates"] if one["chosen"]]
        assert chosen == [selection["name"]]
        assert all(one["reason"] for one in selection["candidates"] if not one["chosen"])


def test_another_gpu_can_be_asked_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = why(capsys, model, "--device", "sm_90")
    assert code == 0, err
    assert "not onednn [native_cpu]: onednn runs on a CPU" in out
    assert "not native [native_cpu]: " in out


def test_a_provider_that_cannot_serve_is_told_with_its_reason(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = why(capsys, model, "--device", "sm_90", "--linear-backend", "onednn")
    assert (code, out) == (1, "")
    assert "--linear-backend names onednn, but none can serve: onednn: " in err


def test_an_unknown_device_or_backend_is_a_configuration_error(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert why(capsys, model, "--device", "tpu")[0] == 2
    code, _, err = why(capsys, model, "--device", "cpu", "--attention-backend", "torhc")
    assert code in (1, 2)  # 1 where a built-in plugin that might have offered it failed
    assert "No attention backend is called 'torhc'. Known: " in err
    assert "torch" in err.partition("Known: ")[2]
