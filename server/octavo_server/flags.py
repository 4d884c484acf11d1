"""Flags and environment variables of vLLM that Octavo knows and does not have, so that none of them passes silently.

A flag that asks for something is an error. At its neutral value it is accepted, and where it stands for something that
is gone or always so.
"""

import json
import logging
import os
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig, flag_of
from octavo.config_args import read_config_file
from octavo.errors import ConfigError

from octavo_server.api_settings import ApiSettings
from octavo_server.settings import ServerSettings

logger = logging.getLogger("octavo.server")

_OFF = ("false",)


@dataclass(frozen=True, slots=True)
class ForeignFlag:
    """A flag that is only recognised.

    `remark` says what holds instead. Values in `neutral` ask for nothing. `ignored`: accepted at any value, with a
    warning. `nargs` is argparse's: 0 for a switch, None for one value, "+" for several.
    """

    name: str
    remark: str = ""
    neutral: tuple[str, ...] = ()
    short: str | None = None
    nargs: int | str | None = None
    ignored: bool = False


def _switch(name: str, remark: str = "", ignored: bool = False) -> ForeignFlag:
    return ForeignFlag(name, remark, _OFF, nargs=0, ignored=ignored)


FOREIGN: tuple[ForeignFlag, ...] = (
    ForeignFlag("swap_space", "Preempted requests are computed again, not swapped out.", ignored=True),
    _switch("calculate_kv_scales", "It has no effect.", ignored=True),
    _switch("disable_log_requests", "Requests are logged only with --enable-log-requests.", ignored=True),
    _switch("trust_remote_code", "No code from a model's repository is ever run.", ignored=True),
    _switch("disable_custom_all_reduce", "Name a communicator with --communicator.", ignored=True),
    _switch("enable_prompt_tokens_details", "Token counts always have their details.", ignored=True),
    ForeignFlag("tokenizer_mode", "Tokenizers are read from tokenizer.json.", ("auto", "hf")),
    ForeignFlag("tokenizer_revision", "Name a directory with --tokenizer."),
    ForeignFlag("quantization_config", "", ("{}",)),
    ForeignFlag("logprobs_mode", "Logprobs are those of the model, before penalties.", ("raw_logprobs",)),
    ForeignFlag("kv_cache_dtype_skip_layers", "", ("[]",), nargs="+"),
    ForeignFlag("prefix_caching_hash_algo", "Blocks are hashed with sha256.", ("sha256",)),
    ForeignFlag("cpu_offload_gb", "", ("0", "0.0")),
    ForeignFlag("kv_offloading_size"),
    ForeignFlag("kv_offloading_backend", "", ("native",)),
    ForeignFlag("max_num_partial_prefills", "See --long-prefill-token-threshold.", ("1",)),
    ForeignFlag("max_long_partial_prefills", "See --long-prefill-token-threshold.", ("1",)),
    ForeignFlag("scheduler_cls", "See --scheduling-policy."),
    _switch("async_scheduling", "Say --max-steps-in-flight 2."),
    ForeignFlag("pipeline_parallel_size", "See --tensor-parallel-size.", ("1",), "-pp"),
    ForeignFlag("data_parallel_size", "Start several servers behind a load balancer.", ("1",), "-dp"),
    _switch("enable_expert_parallel"),
    ForeignFlag("nnodes", "", ("1",), "-n"),
    ForeignFlag("node_rank", "", ("0",), "-r"),
    ForeignFlag("master_addr", "", ("127.0.0.1",)),
    ForeignFlag("master_port", "", ("29501",)),
    ForeignFlag("worker_cls", "Executors are plugins: see --distributed-executor-backend.", ("auto",)),
    ForeignFlag("worker_extension_cls", "", ("",)),
    ForeignFlag("moe_backend", "", ("auto",)),
    ForeignFlag("compilation_config", "", ("{}",), "-cc"),
    ForeignFlag("optimization_level", "", ("0",), "-O"),
    ForeignFlag("cudagraph_capture_sizes", "", nargs="+"),
    ForeignFlag("speculative_config", "", ("{}",), "-sc"),
    _switch("enable_lora"),
    ForeignFlag("lora_modules", nargs="+"),
    ForeignFlag("max_loras", "", ("1",)),
    ForeignFlag("max_lora_rank", "", ("16",)),
    ForeignFlag("logits_processors", "", ("[]",), nargs="+"),
    ForeignFlag("structured_outputs_config", "", ("{}",)),
    ForeignFlag("reasoning_parser", "", ("",)),
    ForeignFlag("tool_call_parser", "", ("",)),
    _switch("enable_auto_tool_choice"),
    ForeignFlag("tool_parser_plugin", "", ("",)),
    ForeignFlag("reasoning_parser_plugin", "", ("",)),
    ForeignFlag("chat_template_content_format", "Templates are given texts.", ("auto", "string")),
    _switch("trust_request_chat_template"),
    ForeignFlag("middleware", "", ("[]",)),
    _switch("enable_per_request_metrics", "See /metrics."),
    _switch("enable_server_load_tracking", "See /metrics."),
    ForeignFlag("collect_detailed_traces"),
    _switch("kv_cache_metrics", "See octavo:kv_cache_wasted_bytes in /metrics."),
    ForeignFlag("kv_cache_metrics_sample", "", ("0.01",)),
    _switch("enable_sleep_mode"),
    ForeignFlag("api_server_count", "", ("1",), "-asc"),
    _switch("headless"),
    _switch("grpc"),
    ForeignFlag(
        "additional_config", "Options of a provider stand behind its name: --attention-backend x:y=1.", ("{}",)
    ),
)
_BY_NAME = {flag.name: flag for flag in FOREIGN}

ForeignSettings = make_dataclass(
    "ForeignSettings", [(flag.name, Any, field(default=None, metadata={"short": flag.short})) for flag in FOREIGN]
)
"""The foreign flags as fields, so that `--config` may hold them as keys."""

ENVIRONMENT = {
    "VLLM_PLUGINS": "name plugins with --plugins or OCTAVO_PLUGINS",
    "VLLM_BATCH_INVARIANT": "see the fact batch_invariant of the backends in /v1/backends",
    "VLLM_DISABLED_KERNELS": "name the kernels to use with --attention-backend, --linear-backend and --ops-backend",
    "VLLM_SERVER_DEV_MODE": "there are no routes for development",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "there are no LoRA adapters yet",
}
"""Variables of vLLM that are not read, and what holds instead."""
_ATTENTION_VARIABLE = "VLLM_ATTENTION_BACKEND"


class _Recognise(Action):
    """Takes a foreign flag's value, and refuses it or lets it pass."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        flag = _BY_NAME[self.dest]
        if flag.nargs == 0:
            value: object = not (option_string or "").startswith("--no-")
        else:
            value = " ".join(values) if isinstance(values, list) else values
        _judge(flag, value)


def add_foreign_arguments(parser: ArgumentParser) -> None:
    """Make the parser recognise the flags, without showing them in its help."""
    for flag in FOREIGN:
        names = [flag_of(flag.name), *([flag.short] if flag.short else [])]
        names += [flag_of(f"no_{flag.name}")] if flag.nargs == 0 else []
        parser.add_argument(
            *names, dest=flag.name, action=_Recognise, nargs=flag.nargs, default=SUPPRESS, help=SUPPRESS
        )


def _judge(flag: ForeignFlag, value: object) -> None:
    """Refuse a value, warn of it, or let it pass. Raises ConfigError."""
    remark = f" {flag.remark}" if flag.remark else ""
    if flag.ignored:
        if _text(value) not in _OFF:
            logger.warning("%s is accepted for vLLM's launch scripts, without effect.%s", flag_of(flag.name), remark)
    elif _text(value) not in flag.neutral:
        raise ConfigError(
            f"{flag_of(flag.name)} is known from vLLM, but not supported yet: leave it out"
            f"{''.join(f', or at {one!r}' for one in flag.neutral[:1] if flag.nargs != 0)}.{remark}"
        )


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else json.dumps(value)


def complete(args: Namespace, environment: Mapping[str, str] | None = None) -> Namespace:
    """The arguments with what vLLM's environment variables add.

    Raises ConfigError for a foreign flag in the `--config` file, and where it is unclear which argument is the model.
    """
    path = getattr(args, "config_file", None)
    in_file = read_config_file(Path(path), ALL_SETTINGS) if path else {}
    for name in in_file.keys() & _BY_NAME.keys():
        _judge(_BY_NAME[name], in_file[name])
    _check_lists(args, "model" in in_file)
    return Namespace(**{**vars(args), **_from_environment(args, os.environ if environment is None else environment)})


def _check_lists(args: Namespace, model_in_file: bool) -> None:
    """`--served-model-name a MODEL` would read MODEL as a second name."""
    if model_in_file or hasattr(args, "model_positional") or hasattr(args, "model"):
        return
    for name in ("served_model_name", "api_key"):
        if any(len(group) > 1 for group in getattr(args, name, ())):
            raise ConfigError(
                f"{flag_of(name)} has several values and no model is named, so that the last may be meant as the "
                "model. Put MODEL first, or say --model."
            )


def _from_environment(args: Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    for name in _set_variables(environment):
        logger.warning("The environment variable %s is not read: %s.", name, ENVIRONMENT[name])
    backend = environment.get(_ATTENTION_VARIABLE)
    if not backend or hasattr(args, "attention_backend"):
        return {}
    logger.warning("The environment variable %s is taken as --attention-backend %s.", _ATTENTION_VARIABLE, backend)
    return {"attention_backend": [backend]}


def _set_variables(environment: Mapping[str, str]) -> Iterator[str]:
    return (name for name in ENVIRONMENT if environment.get(name))


ALL_SETTINGS: Sequence[type] = (EngineConfig, ServerSettings, ApiSettings, ForeignSettings)
