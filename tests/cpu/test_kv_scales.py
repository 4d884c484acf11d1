"""Scales of 8-bit KV caches: from the checkpoint, in files, calibrated against a hand computation, and kept."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from octavo.config import EngineConfig
from octavo.engine.loop import Engine
from octavo.errors import CheckpointError, ConfigError, OctavoError
from octavo.kv_cache.interface import CodeRange
from octavo.kv_cache.scales import checkpoint_scales, read_scales, write_scales
from octavo.runtime import kv_scales
from octavo.runtime.executor import InProcessExecutor
from octavo.start import start_engine
from safetensors.torch import load_file, save_file
from tiny_models import GREEDY, Reference, run, start
from transformers import AutoModelForCausalLM

HEADS, LAYERS = 2, 2
E4M3, INT8 = CodeRange(448.0, 2.0), CodeRange(127.0, 1.5)
ATTENTION = "model.layers.{}.self_attn"


class Tensors:
    """What `checkpoint_scales` asks of a reader."""

    config: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def in_layers(k: str, v: str, make: Callable[[int, str], torch.Tensor]) -> Any:
    return Tensors(
        **{f"{ATTENTION.format(i)}.{name}": make(i, kind) for i in range(LAYERS) for kind, name in (("k", k), ("v", v))}
    )


@pytest.fixture
def directory(llama: Reference, tmp_path: Path) -> Path:
    return copytree(llama.path, tmp_path / "model")


def begin(directory: Path, cache: Path, dtype: str = "fp8", **options: Any) -> tuple[Engine, str]:
    """A started engine, and where its scales come from."""
    config = {"dtype": "float32", "max_model_len": 192, "num_threads": 1, "plugins": (), "progress": False}
    given = config | {"model": str(directory), "kv_cache_dtype": dtype, "download_dir": str(cache)} | options
    engine, info = start_engine(EngineConfig.from_kwargs(**given))
    return engine, info.kv_scales


def _random_prompts() -> list[list[int]]:
    """What a model of 512 tokens and 192 positions without a tokenizer is calibrated with."""
    return [p[at : at + 192] for p in kv_scales._random_prompts(512) for at in range(0, len(p), 192)]


def scales_of(engine: Engine) -> torch.Tensor:
    """The scales [L, 2, Hk] that the engine's caches hold."""
    executor: Any = engine._executor
    assert isinstance(executor, InProcessExecutor)
    return torch.stack([torch.stack((kv.k_scale, kv.v_scale)) for kv in executor.runner.caches])  # type: ignore[arg-type]


# -- the checkpoint's --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "v"),
    [
        ("k_scale", "v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(), (1,), (HEADS,), (1, HEADS, 1, 1)])
def test_every_spelling_is_read(k: str, v: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def make(layer: int, kind: str) -> torch.Tensor:
        first = 0.5 + layer + (4 if kind == "v" else 0)
        count = torch.Size(shape).numel()
        return (first + 8 * torch.arange(count)).to(dtype).view(shape)

    found = checkpoint_scales(in_layers(k, v, make), LAYERS, HEADS, E4M3)
    assert found is not None and found.source == "checkpoint" and found.values.dtype is torch.float32
    other = 8 if torch.Size(shape).numel() == HEADS else 0
    firsts = torch.tensor([[0.5, 4.5], [1.5, 5.5]])
    assert torch.equal(found.values, torch.stack((firsts, firsts + other), dim=-1))


def test_one_scale_for_keys_and_values() -> None:
    found = checkpoint_scales(in_layers("kv_scale", "kv_scale", lambda i, _: torch.tensor(2.0 + i)), 2, HEADS, E4M3)
    assert found is not None and found.values.tolist() == [[[2, 2], [2, 2]], [[3, 3], [3, 3]]]


def test_other_codes_cover_the_same_range() -> None:
    reader = in_layers("k_scale", "v_scale", lambda i, _: torch.tensor(0.25))
    found = checkpoint_scales(reader, LAYERS, HEADS, INT8)
    assert found is not None and torch.allclose(found.values * 127, torch.tensor(0.25 * 448))


def test_a_checkpoint_without_scales() -> None:
    reader: Any = Tensors(**{"model.layers.0.self_attn.q_proj.weight": torch.zeros(1)})
    assert checkpoint_scales(reader, LAYERS, HEADS, E4M3) is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.tensor(0.0), "holds 0"),
        (torch.tensor(-1.0), "holds -1"),
        (torch.tensor(float("nan")), "holds nan"),
        (torch.ones(3), r"shape \[3\].*each of the 2 KV heads"),
        (torch.tensor(1), "is int64"),
    ],
)
def test_tensors_that_are_no_scales(value: torch.Tensor, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"layers.0.self_attn.k_scale.*{says}.*--kv-scales calibrate"):
        checkpoint_scales(in_layers("k_scale", "v_scale", lambda i, _: value), LAYERS, HEADS, E4M3)


@pytest.mark.parametrize("missing", ["model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale"])
def test_incomplete_scales_are_refused(missing: str) -> None:
    reader = in_layers("k_scale", "v_scale", lambda i, _: torch.tensor(1.0))
    del reader.tensors()[missing]
    layer, _, name = missing.rpartition(".")
    with pytest.raises(CheckpointError, match=f"{layer} has none named {name}"):
        checkpoint_scales(reader, LAYERS, HEADS, E4M3)


def test_the_checkpoints_scales_serve(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    for layer in range(LAYERS):
        tensors[f"{ATTENTION.format(layer)}.k_scale"] = torch.tensor([0.125 + layer], dtype=torch.bfloat16)
        tensors[f"{ATTENTION.format(layer)}.v_scale"] = torch.tensor([0.25 + layer], dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    engine, source = begin(directory, tmp_path)
    assert source == "checkpoint"
    assert scales_of(engine).tolist() == [[[0.125] * 2, [0.25] * 2], [[1.125] * 2, [1.25] * 2]]
    engine.shutdown()
    engine, source = begin(directory, tmp_path, kv_scales="calibrate")
    assert source.startswith("calibrated now") and (scales_of(engine) < 0.125).all()
    engine.shutdown()
    engine, source = begin(directory, tmp_path, dtype="auto")  # they do not by themselves ask for a format
    assert source == "" and engine.stats().num_kv_written == 0
    engine.shutdown()


# -- calibrated --------------------------------------------------------------------------------------------------------


def _largest_by_hand(directory: Path, prompts: list[list[int]]) -> torch.Tensor:
    """The largest keys and values of transformers' own cache [L, 2, Hk]."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    largest = torch.zeros(LAYERS, 2, HEADS)
    for prompt in prompts:
        with torch.no_grad():
            cache = model(torch.tensor([prompt]), use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            found = torch.stack((layer.keys[0], layer.values[0])).abs().amax((2, 3))
            largest[i] = torch.maximum(largest[i], found)
    return largest


def test_calibrated_scales_are_the_largest_values_with_headroom(llama: Reference, tmp_path: Path) -> None:
    """A model without a tokenizer runs on random tokens, cut to what a step and a request may hold."""
    prompts = _random_prompts()
    engine, source = begin(llama.path, tmp_path)
    (kept,) = tmp_path.rglob("*.json")
    assert source == f"calibrated now, kept in {kept}"
    assert torch.allclose(scales_of(engine), _largest_by_hand(llama.path, prompts) * 2 / 448, rtol=1e-4)
    engine.shutdown()


def test_short_steps_calibrate_with_the_same_prompts(llama: Reference, tmp_path: Path) -> None:
    engine, _ = begin(llama.path, tmp_path / "long")
    short, _ = begin(llama.path, tmp_path / "short", max_num_batched_tokens=7, max_num_seqs=4)
    assert torch.allclose(scales_of(short), scales_of(engine), rtol=1e-4)


def test_random_weights_leave_no_file(llama: Reference, tmp_path: Path) -> None:
    assert begin(llama.path, tmp_path, load_format="dummy")[1] == "calibrated now, for weights that are random"
    assert not list(tmp_path.rglob("*.json"))


def test_a_named_tokenizer_must_be_there(llama: Reference, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        begin(llama.path, tmp_path, tokenizer=str(tmp_path / "nowhere"))


def test_where_nobody_may_look_nothing_is_found(
    llama: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists

    def refuse(self: Path) -> bool:
        if "kv_scales" in str(self):
            raise PermissionError(self)
        return exists(self)

    monkeypatch.setattr(Path, "exists", refuse)
    assert begin(llama.path, tmp_path)[1].startswith("calibrated now")


@pytest.mark.parametrize("scheme", [{"type": "int", "num_bits": 8}, {"type": "float", "num_bits": 4}])
def test_scales_for_other_codes_are_refused(scheme: dict[str, Any]) -> None:
    reader = in_layers("k_scale", "v_scale", lambda layer, name: torch.ones(1))
    reader.config = {"quantization_config": {"kv_cache_scheme": scheme}}
    with pytest.raises(CheckpointError, match=r"codes of \d bits, (int|float).*--kv-scales calibrate"):
        checkpoint_scales(reader, LAYERS, HEADS, CodeRange(448.0, 2.0))


def test_the_second_start_calibrates_nothing(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = begin(directory, tmp_path)
    wanted = scales_of(engine)
    engine.shutdown()
    (kept,) = tmp_path.rglob("kv_scales/*.json")
    assert not list(directory.glob("*scales*"))
    with monkeypatch.context() as patch:
        patch.setattr("octavo.runtime.worker.largest_values", lambda *_: pytest.fail("calibrated again"))
        engine, source = begin(directory, tmp_path)
        assert source == f"calibrated before, from {kept}" and torch.equal(scales_of(engine), wanted)
        engine.shutdown()
        with pytest.raises(pytest.fail.Exception):
            begin(directory, tmp_path, kv_scales="calibrate")
    (directory / "generation_config.json").write_text("{}")  # another model, as far as anyone can tell
    engine, source = begin(directory, tmp_path)
    assert source.startswith("calibrated now")
    engine.shutdown()


def test_each_format_keeps_its_own(llama: Reference, tmp_path: Path) -> None:
    for dtype in ("fp8", "int8"):
        engine, source = begin(llama.path, tmp_path, dtype=dtype)
        assert source.startswith("calibrated now")
        engine.shutdown()
    assert len(list(tmp_path.rglob("*.json"))) == 2
    engine, source = begin(llama.path, tmp_path, dtype="fp8_e4m3")
    assert source.startswith("calibrated before")
    engine.shutdown()


def test_a_damaged_file_is_made_again(llama: Reference, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(llama.path, tmp_path)[0].shutdown()
    (kept,) = tmp_path.rglob("*.json")
    kept.write_text("{")
    engine, source = begin(llama.path, tmp_path)
    engine.shutdown()
    assert source.startswith("calibrated now") and "calibrated again" in caplog.text
    assert json.loads(kept.read_text())["layout"] == "fp8"


def test_where_nothing_can_be_kept_it_serves_all_the_same(llama: Reference, tmp_path: Path) -> None:
    (tmp_path / "octavo").write_text("no directory")
    engine, source = begin(llama.path, tmp_path)
    assert source.startswith("calibrated now, and not kept:")
    engine.shutdown()


def test_windows_and_groups_are_calibrated(tmp_path: Path) -> None:
    """Layers of two groups share pages, each in blocks of its own."""
    from tiny_models import make_reference

    reference = make_reference("qwen2-two-groups", tmp_path / "model")
    prompts = _random_prompts()
    engine, _ = begin(reference.path, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(reference.path, dtype=torch.float32).eval()
    assert scales_of(engine).shape == (model.config.num_hidden_layers, 2, HEADS)
    values = [model.model.layers[0].self_attn.v_proj, model.model.layers[0].input_layernorm]
    with torch.no_grad():  # the first layer's values depend on tokens alone
        v = values[0](values[1](model.model.embed_tokens(torch.tensor(sorted({t for p in prompts for t in p})))))
    wanted = v.view(-1, HEADS, 16).abs().amax((0, 2)) * 2 / 448
    assert torch.allclose(scales_of(engine)[0, 1], wanted, rtol=1e-4)
    engine.shutdown()


def test_values_that_are_not_finite_are_refused(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"].fill_(float("inf"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="values of layer 1 are not finite"):
        begin(directory, tmp_path)
    assert not list(tmp_path.rglob("kv_scales/*"))


# -- files and wishes --------------------------------------------------------------------------------------------------


def test_a_file_comes_back_bit_for_bit(tmp_path: Path) -> None:
    values = torch.rand(3, 2, 4) + 1e-8
    write_scales(tmp_path / "deep" / "scales.json", "int8", values)
    assert torch.equal(read_scales(tmp_path / "deep" / "scales.json", "int8", 3, 4), values)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["scales.json"]


def _content(**changes: Any) -> str:
    return json.dumps({"layout": "fp8", "keys": [[1.0, 2], [3, 4]], "values": [[5, 6], [7, 8]]} | changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", "holds list"),
        (_content(layout="int8"), "for the format 'int8', but 'fp8'"),
        (_content(keys=None), "a list of numbers for every layer"),
        (_content(keys=[[1, 2], [3]]), "a list of numbers for every layer"),
        (_content(keys=[[1, 2]]), r"shape \[1, 2\], but the model has 2 layers of 2 KV heads"),
        (_content(values=[[1], [2]]), r"'values'.*shape \[2, 1\]"),
        (_content(keys=[[1, 2], [3, -4]]), "'keys' of layer 1, head 1 .* is -4"),
        (_content(values=[[0, 2], [3, 4]]), "'values' of layer 0, head 0 .* is 0"),
        (_content(keys=[[1, float("nan")], [3, 4]]), "layer 0, head 1 .* is nan"),
        (_content(keys=[[1, 1e300], [3, 4]]), "is 1e"),
        (_content(keys=[[1, 10**400], [3, 4]]), "a list of numbers for every layer"),
    ],
)
def test_bad_files(text: str, says: str, llama: Reference, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        begin(llama.path, tmp_path, kv_scales=str(path))
    assert str(path) in str(caught.value)


def test_a_file_and_the_unit(llama: Reference, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(_content())
    engine, source = begin(llama.path, tmp_path, kv_scales=str(path))
    assert source == f"file {path}" and scales_of(engine).tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    engine.shutdown()
    engine, source = begin(llama.path, tmp_path, kv_scales="unit")
    assert source == "unit" and scales_of(engine).eq(1).all()
    engine.shutdown()


@pytest.mark.parametrize("wish", ["unit", "calibrate", "/nowhere.json"])
def test_a_plain_cache_has_no_scales(llama: Reference, wish: str) -> None:
    error: type[OctavoError] = ConfigError
    with pytest.raises(error, match=f"kv_scales .--kv-scales. is '{wish}', but the KV-cache format 'plain'"):
        start(llama.path, kv_scales=wish)


def test_the_shipped_text_is_for_those_with_a_tokenizer(directory: Path, tmp_path: Path) -> None:
    from tiny_tokenizer import write_tokenizer

    write_tokenizer(directory)
    begin(directory, tmp_path)[0].shutdown()
    (with_text,) = tmp_path.rglob("kv_scales/*.json")
    text = json.loads(with_text.read_text())
    for path in directory.glob("token*"):
        path.unlink()
    begin(directory, tmp_path)[0].shutdown()
    (other,) = set(tmp_path.rglob("kv_scales/*.json")) - {with_text}
    assert json.loads(other.read_text()) != text


def test_a_request_after_the_calibration_sees_nothing_of_it(llama: Reference, tmp_path: Path) -> None:
    """Float pages after calibrating equal those after scales from a file."""
    engine, _ = begin(llama.path, tmp_path)
    first = run(engine, llama.prompts[:4], GREEDY)
    engine.shutdown()
    engine, source = begin(llama.path, tmp_path)
    assert source.startswith("calibrated before")
    assert [a.token_ids for a in run(engine, llama.prompts[:4], GREEDY)] == [a.token_ids for a in first]
    engine.shutdown()
