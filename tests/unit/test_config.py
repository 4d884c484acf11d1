"""The configuration: its values' limits, and flags > environment > YAML > defaults."""

from argparse import Namespace
from dataclasses import Field, FrozenInstanceError, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from octavo.cli import Parser
from octavo.config import EngineConfig, documented, flag_of
from octavo.config_args import add_arguments, add_engine_arguments, engine_config, resolve
from octavo.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"


def parse(*arguments: str) -> EngineConfig:
    parser = Parser(prog="octavo test")
    add_engine_arguments(parser)
    return engine_config(parser.parse_args(list(arguments)))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OCTAVO_PLUGINS", "OCTAVO_DOWNLOAD_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_no_flag_is_every_default() -> None:
    assert parse() == EngineConfig()


def test_every_field_has_a_flag_and_a_help_text() -> None:
    parser = Parser(prog="octavo test")
    add_engine_arguments(parser)
    text = parser.format_help()
    for item in fields(EngineConfig):
        assert flag_of(item.name) in text
        assert item.metadata["help"]


def test_flags_of_every_type() -> None:
    config = parse(
        "some/model",
        "--max_model_len=32k",
        "--kv-cache-memory-bytes",
        "1.5G",
        "-tp",
        "2",
        "-q",
        "awq",
        "--gpu-memory-utilization",
        "0.5",
        "--no-enable-prefix-caching",
        "--enforce_eager",
        "--attention-backend",
        "triton:splits=8,mode=fast,torch",
        "--attention_backend",
        "third",
        "--plugins",
        "",
    )
    assert (config.model, config.max_model_len, config.kv_cache_memory_bytes) == ("some/model", 32_000, 3 << 29)
    assert (config.tensor_parallel_size, config.quantization, config.gpu_memory_utilization) == (2, "awq", 0.5)
    assert (config.enable_prefix_caching, config.enforce_eager) == (False, True)
    assert config.attention_backend == ("triton:splits=8,mode=fast", "torch", "third")
    assert config.plugins == ()


def test_the_model_is_positional_or_a_flag_but_one() -> None:
    assert parse("a/b").model == parse("--model", "a/b").model == parse("a/b", "--model", "a/b").model == "a/b"
    with pytest.raises(ConfigError, match="given twice, as 'a/b' and as --model 'c'"):
        parse("a/b", "--model", "c")


def test_flags_win_over_environment_over_yaml_over_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("plugins: [from_file]\nmax-num-seqs: 8\nblock_size: 32\nmax_model_len: 2K\nmodel: null\n")
    flags = ["--config", str(file)]
    config = parse(*flags, "--block-size", "64")
    assert (config.plugins, config.max_num_seqs, config.block_size) == (("from_file",), 8, 64)
    assert (config.max_model_len, config.model) == (2048, "")
    monkeypatch.setenv("OCTAVO_PLUGINS", "from_environment,another")
    assert parse(*flags).plugins == ("from_environment", "another")
    assert parse(*flags, "--plugins", "from_flag").plugins == ("from_flag",)
    monkeypatch.setenv("OCTAVO_PLUGINS", "")
    assert parse(*flags).plugins == ("from_file",)
    monkeypatch.setenv("OCTAVO_DOWNLOAD_DIR", "/models")
    assert parse().download_dir == "/models"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("blok_size: 32", r"'blok_size' is not a setting \(.*octavo.yaml\)\. Did you mean 'block_size'"),
        ("max-num-seqs: 8\nmax_num_seqs: 9", "sets max_num_seqs twice"),
        ("block_size: many", "block_size in .*octavo.yaml is 'many', but must be a whole number"),
        ("block_size: true", "must be a whole number"),
        ("dtype: 16", "must be text"),
        ("- block_size", "must hold `name: value` lines, not a list"),
        ("block_size: [", "cannot be read"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        parse("--config", str(file))


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: .*No such file"):
        parse("--config", str(tmp_path / "absent.yaml"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parse("--config", str(tmp_path / "empty.yaml")) == EngineConfig()


@dataclass(frozen=True)
class HouseConfig:
    """Settings of somebody else."""

    port: int = documented("where to listen", 8000)


def test_a_file_may_hold_the_settings_of_another_dataclass(tmp_path: Path) -> None:
    file = tmp_path / "octavo.yaml"
    file.write_text("port: 9000\nblock-size: 32\n")
    parser = Parser(prog="octavo test")
    add_engine_arguments(parser)
    add_arguments(parser, HouseConfig)
    args = parser.parse_args(["--config", str(file)])
    assert engine_config(args, [HouseConfig]).block_size == 32
    assert resolve(HouseConfig, args, [EngineConfig]) == HouseConfig(port=9000)
    with pytest.raises(ConfigError, match="'port' is not a setting"):
        engine_config(args)


def test_unknown_flags_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--max-modl-len is not a known flag\. Did you mean '--max-model-len'"):
        parse("--max_modl_len=5")
    with pytest.raises(ConfigError, match="--max-model is not a known flag"):  # no abbreviations
        parse("--max-model", "5")
    with pytest.raises(ConfigError, match="surplus is not a known argument"):
        parse("a/b", "surplus")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block_size": 12}, r"block_size \(--block-size\) is 12, but must be a power of two and at least 8"),
        ({"block_size": 4}, "at least 8"),
        ({"block_size": -8}, "at least 8"),
        ({"gpu_memory_utilization": 0.0}, "above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.01}, "above 0 and at most 1"),
        ({"gpu_memory_utilization": float("nan")}, "above 0 and at most 1"),
        ({"seed": -1}, "from 0 to"),
        ({"max_model_len": 0}, "at least 1"),
        ({"max_num_seqs": 0}, "at least 1"),
        ({"tensor_parallel_size": 0}, "at least 1"),
        ({"max_steps_in_flight": 0}, "at least 1"),
        ({"long_prefill_token_threshold": -1}, "at least 0"),
        ({"max_logprobs": -1}, "at least 0"),
        ({"dtype": "bfloat"}, "one of auto, bfloat16.*Did you mean 'bfloat16'"),
        ({"device": "gpu"}, "one of auto, cpu, cuda"),
        ({"load_format": "pt"}, "one of auto, safetensors, dummy"),
        ({"scheduling_policy": "lifo"}, "one of fcfs, priority"),
        ({"generation_config": "none"}, "one of auto, octavo"),
        ({"plugins": ("a", "b"), "disable_plugin": ("b",)}, "both name b"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 512, "max_model_len": 1024},
            "max_num_batched_tokens is 512 and max_model_len 1024",
        ),
    ],
)
def test_values_out_of_range_are_one_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**values)


def test_values_at_the_limits_pass() -> None:
    config = EngineConfig(
        block_size=8, gpu_memory_utilization=1.0, seed=2**64 - 1, max_logprobs=0, max_num_seqs=1, dtype="half"
    )
    assert config.dtype == "float16"
    EngineConfig(enable_chunked_prefill=False, max_num_batched_tokens=1024, max_model_len=1024)
    assert EngineConfig(generation_config="vllm").generation_config == "octavo"


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineConfig().block_size = 32  # type: ignore[misc]


def test_keyword_arguments_are_converted() -> None:
    class Bfloat16:
        """Prints as torch's dtype does."""

        def __str__(self) -> str:
            return "torch.bfloat16"

    config = EngineConfig.from_kwargs(
        model=PurePosixPath("a/b"),
        dtype=Bfloat16(),
        attention_backend=["triton:splits=8", "torch"],
        linear_backend="onednn,torch",
        max_model_len="4K",
        block_size=None,
    )
    assert (config.model, config.dtype, config.max_model_len, config.block_size) == ("a/b", "bfloat16", 4096, 16)
    assert config.attention_backend == ("triton:splits=8", "torch")
    assert config.linear_backend == ("onednn", "torch")


def test_unknown_keyword_arguments_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'max_num_seq' is not an engine argument\. Did you mean 'max_num_seqs'"):
        EngineConfig.from_kwargs(max_num_seq=4)
    with pytest.raises(ConfigError, match="max_num_seqs is 'few', but must be a whole number"):
        EngineConfig.from_kwargs(max_num_seqs="few")


def test_an_empty_namespace_resolves() -> None:
    assert engine_config(Namespace()) == EngineConfig()


def flags_row(item: Field[Any]) -> str:
    """A field's row in the page's table."""
    names = [flag_of(item.name)]
    names += [flag_of(f"no_{item.name}")] if isinstance(item.default, bool) else []
    names += [item.metadata["short"]] if item.metadata["short"] else []
    default = "" if item.default in (None, (), "") else str(item.default)
    variable = item.metadata.get("env")
    meaning = item.metadata["help"] + (f" (environment: `{variable}`)" if variable else "")
    spelt = ", ".join(f"`{name}`" for name in names)
    return f"| {spelt} | {default.lower() if isinstance(item.default, bool) else default} | {meaning} |"


def test_the_page_of_flags_is_up_to_date() -> None:
    page = (DOCS / "flags.md").read_text(encoding="utf-8").splitlines()
    rows = [flags_row(item) for item in fields(EngineConfig)]
    assert [row for row in page if row.startswith("| `")][: len(rows)] == rows  # other packages' flags follow
