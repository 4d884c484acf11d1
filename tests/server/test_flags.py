"""Launch scripts written for vLLM: each of its flags is taken, warned of or refused by name."""

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import pytest
from octavo.cli import Parser
from octavo.config import EngineConfig
from octavo.config_args import engine_config, resolve
from octavo.errors import ConfigError
from octavo_server.api_settings import ApiSettings
from octavo_server.flags import ALL_SETTINGS, FOREIGN, ForeignFlag, complete
from octavo_server.flags_page import page
from octavo_server.serve import ServeCommand
from octavo_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
VLLM_FLAGS = """
model served-model-name tokenizer tokenizer-mode trust-remote-code revision tokenizer-revision download-dir dtype seed
max-model-len quantization quantization-config load-format enforce-eager generation-config override-generation-config
max-logprobs logprobs-mode kv-cache-dtype kv-cache-dtype-skip-layers calculate-kv-scales block-size
gpu-memory-utilization kv-cache-memory-bytes num-gpu-blocks-override enable-prefix-caching prefix-caching-hash-algo
swap-space cpu-offload-gb kv-offloading-size kv-offloading-backend max-num-batched-tokens max-num-seqs
enable-chunked-prefill max-num-partial-prefills long-prefill-token-threshold scheduling-policy scheduler-cls
async-scheduling stream-interval tensor-parallel-size pipeline-parallel-size data-parallel-size enable-expert-parallel
distributed-executor-backend nnodes node-rank master-addr master-port disable-custom-all-reduce worker-cls
worker-extension-cls attention-backend linear-backend moe-backend compilation-config cudagraph-capture-sizes
speculative-config enable-lora lora-modules max-loras max-lora-rank logits-processors structured-outputs-config
reasoning-parser tool-call-parser enable-auto-tool-choice tool-parser-plugin reasoning-parser-plugin chat-template
chat-template-content-format response-role default-chat-template-kwargs host port uds api-key ssl-keyfile ssl-certfile
ssl-ca-certs ssl-cert-reqs ssl-ciphers enable-ssl-refresh allowed-origins allowed-methods allowed-headers
allow-credentials root-path middleware uvicorn-log-level disable-uvicorn-access-log disable-access-log-for-endpoints
enable-request-id-headers disable-fastapi-docs enable-log-requests enable-log-outputs max-log-len disable-log-requests
disable-log-stats enable-prompt-tokens-details enable-force-include-usage enable-per-request-metrics
enable-server-load-tracking otlp-traces-endpoint collect-detailed-traces kv-cache-metrics kv-cache-metrics-sample
enable-sleep-mode shutdown-timeout max-num-queued-reqs max-num-queued-tokens config additional-config
"""
SHORT = ("-q", "-tp", "-pp", "-dp", "-n", "-r", "-cc", "-O", "-sc")


def _parser() -> Parser:
    parser = Parser(prog="octavo serve")
    ServeCommand().add_arguments(parser)
    return parser


def _parse(*arguments: str, environment: dict[str, str] | None = None) -> Namespace:
    return complete(_parser().parse_args(list(arguments)), environment or {})


def test_every_flag_of_vllm_is_known() -> None:
    known = _parser()._option_string_actions
    assert [name for name in VLLM_FLAGS.split() if f"--{name}" not in known] == []
    assert [name for name in SHORT if name not in known] == []


def test_no_flag_is_both_ours_and_foreign() -> None:
    own = {item.name for cls in (EngineConfig, ServerSettings, ApiSettings) for item in fields(cls)}
    assert own.isdisjoint(flag.name for flag in FOREIGN)


@pytest.mark.parametrize("flag", FOREIGN, ids=lambda flag: flag.name)
def test_foreign_flag(flag: ForeignFlag, caplog: pytest.LogCaptureFixture) -> None:
    name = "--" + flag.name.replace("_", "-")
    asking = [name] if flag.nargs == 0 else [name, "something"]
    if flag.ignored:
        _parse("m", *asking)
        assert f"{name} is accepted" in caplog.text
    else:
        with pytest.raises(ConfigError, match=f"{name} is known from vLLM, but not supported yet: leave it out"):
            _parse("m", *asking)
    caplog.clear()
    neutral = [f"--no-{name[2:]}"] if flag.nargs == 0 else [f"{name}={one}" for one in flag.neutral]
    assert _parse("m", *neutral).model_positional == "m" and caplog.text == ""


def test_a_script_for_vllm_runs(caplog: pytest.LogCaptureFixture) -> None:
    script = """org/model --served-model-name one two --dtype auto --max_model_len 32K --gpu-memory-utilization 0.95
        --trust-remote-code --swap-space 4 --disable-log-requests --pipeline-parallel-size 1 --tensor-parallel-size 1
        --no-enable-prefix-caching --max-num-seqs=64 --host 0.0.0.0 --port 9000 --generation-config vllm -q awq"""
    args = _parse(*script.split())
    config = engine_config(args, ALL_SETTINGS)
    assert (config.model, config.max_model_len, config.enable_prefix_caching) == ("org/model", 32768, False)
    assert (config.generation_config, config.quantization, config.max_num_seqs) == ("octavo", "awq", 64)
    settings = resolve(ServerSettings, args, ALL_SETTINGS)
    assert (settings.served_model_name, settings.host, settings.port) == (("one", "two"), "0.0.0.0", 9000)
    warned = [message.split()[0] for message in caplog.messages]
    assert warned == ["--trust-remote-code", "--swap-space", "--disable-log-requests"]


def test_unknown_flag_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--max-modle-len is not a known flag\. Did you mean '--max-model-len'"):
        _parse("m", "--max_modle_len", "1")


def test_names_that_may_hold_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="--served-model-name has several values and no model is named"):
        _parse("--served-model-name", "one", "org/model")
    for fine in (["--served-model-name", "one,two"], ["--served-model-name", "a", "--served-model-name", "b"]):
        _parse(*fine)
    _parse("--model", "m", "--served-model-name", "one", "two")


def test_json_flags() -> None:
    args = _parse("--override-generation-config", '{"top_k": 5}', "--default-chat-template-kwargs", "{}")
    settings = resolve(ApiSettings, args, ALL_SETTINGS)
    assert (settings.override_generation_config, settings.default_chat_template_kwargs) == ({"top_k": 5}, {})
    for wrong in ("[1]", "{", "x"):
        with pytest.raises(ConfigError, match=r"--override-generation-config is .* but must be a JSON object"):
            resolve(ApiSettings, _parse("--override-generation-config", wrong), ALL_SETTINGS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"unknown_fields": "ignore"}, "--unknown-fields is 'ignore', but must be refuse or warn"),
        ({"default_chat_template_kwargs": {"tools": []}}, "--default-chat-template-kwargs holds 'tools'"),
        ({"stream_interval": 0}, "--stream-interval is 0, but must be at least 1"),
        ({"override_generation_config": {"top_kk": 1}}, "'top_kk' is not a sampling parameter.*'top_k'"),
    ],
)
def test_settings_are_checked(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ApiSettings(**wrong)  # type: ignore[arg-type]


def test_the_file_may_hold_all_flags(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: m\nport: 9000\nstream-interval: 4\nswap-space: 4\nenable-lora: false\ncompilation-config: {}\n"
        "override-generation-config: {top_k: 3}\nserved-model-name: [a, b]\n"
    )
    args = _parse("--config", str(path), "--port", "1")
    assert engine_config(args, ALL_SETTINGS).model == "m"
    settings = resolve(ServerSettings, args, ALL_SETTINGS)
    assert (settings.port, settings.served_model_name) == (1, ("a", "b"))
    api = resolve(ApiSettings, args, ALL_SETTINGS)
    assert (api.stream_interval, api.override_generation_config) == (4, {"top_k": 3})
    assert "--swap-space is accepted" in caplog.text
    path.write_text("enable-lora: true\n")
    with pytest.raises(ConfigError, match="--enable-lora is known from vLLM"):
        _parse("--config", str(path))
    path.write_text("enable-loras: true\n")
    with pytest.raises(ConfigError, match="Did you mean 'enable_lora'"):
        _parse("--config", str(path))


def test_environment_of_vllm(caplog: pytest.LogCaptureFixture) -> None:
    args = _parse("m", environment={"VLLM_ATTENTION_BACKEND": "TORCH", "VLLM_PLUGINS": "x", "VLLM_BATCH_INVARIANT": ""})
    assert engine_config(args, ALL_SETTINGS).attention_backend == ("TORCH",)
    assert "VLLM_PLUGINS is not read: name plugins with --plugins" in caplog.text
    assert "VLLM_ATTENTION_BACKEND is taken as --attention-backend TORCH" in caplog.text
    assert "VLLM_BATCH_INVARIANT" not in caplog.text
    args = _parse("m", "--attention-backend", "torch", environment={"VLLM_ATTENTION_BACKEND": "TORCH"})
    assert engine_config(args, ALL_SETTINGS).attention_backend == ("torch",)


def test_the_page_is_up_to_date() -> None:
    again = "write it again: python -m octavo_server.flags_page > docs/flags.md"
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page(), again


@pytest.mark.parametrize("setting", ["auto", "octavo"])
def test_overridden_sampling_defaults_win(setting: str) -> None:
    from octavo.admission import EngineInfo
    from octavo_server.jobs import Api

    class Engine:
        """What sampling defaults come from."""

        config = EngineConfig(generation_config=setting)
        info = EngineInfo(
            model="m", max_model_len=1, vocab_size=1, generation_config={"temperature": 0.5, "top_p": 0.25}
        )

    api = Api(Engine(), ApiSettings(override_generation_config={"temperature": 0.75}))  # type: ignore[arg-type]
    assert api.sampling_defaults() == ({"top_p": 0.25} if setting == "auto" else {}) | {"temperature": 0.75}
