"""The providers that come with the core: torch references, plain formats, models. A plugin like any other."""

from collections.abc import Sequence
from typing import Any

from octavo.plugins.records import Provider, hookimpl
from octavo.plugins.registry import LoadedProvider

_MODELS = {
    "LlamaForCausalLM": ("llama", "Llama 2 and 3, SmolLM2 and others of that shape"),
    "MistralForCausalLM": ("mistral", "Mistral, with its sliding window"),
    "Qwen2ForCausalLM": ("qwen2", "Qwen2 and Qwen2.5"),
    "Qwen3ForCausalLM": ("qwen3", "Qwen3, dense"),
}


def _provider(name: str, factory: str, summary: str, priority: int = 0) -> Provider:
    return Provider(name=name, factory=f"octavo.{factory}", summary=summary, priority=priority)


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    """The torch reference."""
    summary = "the reference in torch, on any device and KV format"
    return [_provider("torch", "attention.torch_reference:TorchAttention", summary)]


@hookimpl
def octavo_kv_cache_formats() -> list[Provider]:
    """The plain format."""
    return [_provider("plain", "kv_cache.plain:PlainFormat", "keys and values in the model's dtype")]


@hookimpl
def octavo_weight_formats() -> list[Provider]:
    """Dense weights."""
    summary = "dense weights as the checkpoint stores them"
    return [_provider("unquantized", "weights.unquantized:Unquantized", summary)]


@hookimpl
def octavo_matmuls() -> list[Provider]:
    """The torch reference."""
    return [_provider("torch", "weights.torch_matmul:TorchMatmul", "the reference in torch")]


@hookimpl
def octavo_fused_ops() -> list[Provider]:
    """The torch references."""
    return [_provider("torch", "ops.torch_reference:TorchOps", "the references in torch")]


@hookimpl
def octavo_communicators() -> list[Provider]:
    """One rank alone."""
    return [_provider("solo", "distributed.solo:Solo", "one rank, nothing to exchange")]


@hookimpl
def octavo_executors() -> list[Provider]:
    """The executor in the engine's own process."""
    return [_provider("uni", "runtime.executor:InProcessExecutor", "one worker in the engine's own process")]


@hookimpl
def octavo_models() -> list[Provider]:
    """Dense decoder models."""
    return [_provider(name, f"models.{module}:{name}", summary) for name, (module, summary) in _MODELS.items()]


@hookimpl
def octavo_checkpoint_readers() -> list[Provider]:
    """HF directories."""
    factory = "checkpoints.safetensors_reader:SafetensorsReader"
    return [_provider("safetensors", factory, "HF directory with (sharded) safetensors")]


@hookimpl
def octavo_commands() -> list[Provider]:
    """`octavo plugins`."""
    return [_provider("plugins", "plugins_command:PluginsCommand", "list the plugins, or why a provider is chosen")]


@hookimpl(trylast=True)
def octavo_choose(kind: str, spec: Any, candidates: Sequence[LoadedProvider]) -> str | None:
    """The core's own answer: the first candidate that can serve."""
    return candidates[0].name if candidates else None
