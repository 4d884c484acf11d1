"""Which provider serves what: every selection that a model on a device calls for, before any weight is read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from octavo.attention.combinators import PhaseSelection, by_phase
from octavo.attention.interface import AttentionSpec
from octavo.config import EngineConfig
from octavo.device import DeviceInfo
from octavo.engine.block_manager import KVGroup
from octavo.errors import CheckpointError, ConfigError, PluginError, UnservedError
from octavo.kv_cache.interface import KVCacheFormat, KVSpec
from octavo.models.config import DecoderConfig
from octavo.models.decoder import Decoder
from octavo.ops.interface import OPS, OpSpec
from octavo.plugins.options import split_reference
from octavo.plugins.registry import LoadedProvider, Plugins
from octavo.plugins.selection import BuildReason, Selection, choose
from octavo.runtime.placement import Placement
from octavo.weights.interface import MatmulSpec, WeightFormat
from octavo.weights.unquantized import quantization_of

logger = logging.getLogger(__name__)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
DEFAULT_MAX_REQUESTS = {"cpu": 256, "cuda": 512}
DEFAULT_MAX_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step and a request may hold."""

    max_requests: int
    max_tokens: int
    max_model_len: int


@dataclass(slots=True)
class Assembly:
    """A model's class and shape, its limits, and the providers selected for it.

    `layer_groups[i]` is layer i's KV group.
    """

    plugins: Plugins
    config: EngineConfig
    device: DeviceInfo
    model_class: type[Decoder]
    model: DecoderConfig
    dtype: torch.dtype
    limits: Limits
    weight_format: WeightFormat
    cache_format: KVCacheFormat
    groups: tuple[KVGroup, ...]
    layer_groups: tuple[int, ...]
    selections: list[Selection] = field(default_factory=list)
    attention: list[tuple[Selection, AttentionSpec]] = field(default_factory=list)
    ops: dict[str, Selection] = field(default_factory=dict)
    placement: Placement = field(init=False)

    def __post_init__(self) -> None:
        self.placement = Placement(self._choose_matmul, self.dtype, self.device, self.config.strict_backends)

    def _choose_matmul(self, spec: MatmulSpec, reason: BuildReason) -> Selection:
        """Of the named matmuls those count that multiply such weights; where none does, the choice is automatic."""
        named = self.config.linear_backend
        classes: list[Any] = [self.plugins.get("matmul", split_reference(text)[0]).load() for text in named]
        fitting = tuple(text for text, cls in zip(named, classes, strict=True) if spec.weight in cls.handles)
        return self._choose("matmul", spec, fitting, build_reason=reason)

    def check_named_matmuls(self) -> None:
        """Say it where no layer of the model calls for a named matmul. Raises PluginError under --strict-backends."""
        used = {layer.matmul for layer in self.placement.layers}
        named = [split_reference(text)[0] for text in self.config.linear_backend]
        if named and used.isdisjoint(named):
            message = f"--linear-backend names {', '.join(named)}, but the model has no layer that they multiply."
            if self.config.strict_backends:
                raise PluginError(f"{message} Name another, or leave --strict-backends out.")
            logger.warning(message)

    def _choose(self, kind: str, spec: Any, requested: tuple[str, ...], **reasons: Any) -> Selection:
        selection = choose(self.plugins, kind, spec, requested, strict=self.config.strict_backends, **reasons)
        self.selections.append(selection)
        return selection


def assemble(config: EngineConfig, plugins: Plugins, checkpoint: Mapping[str, Any], device: DeviceInfo) -> Assembly:
    """Select everything for the checkpoint with this config.json. Raises PluginError, ConfigError, CheckpointError."""
    model_class = _model_class(plugins, checkpoint)
    model = model_class.read_config(checkpoint)
    dtype = _dtype(config, checkpoint, device)
    kv_spec = KVSpec(model.num_kv_heads, model.head_dim, config.block_size, dtype)
    named = () if config.kv_cache_dtype == "auto" else (config.kv_cache_dtype,)
    weights, weight_format = _weight_format(config, plugins, checkpoint)
    kv = choose(plugins, "kv_cache", kv_spec, named)
    windows = list(dict.fromkeys(model.windows))
    assembly = Assembly(
        plugins,
        config,
        device,
        model_class,
        model,
        dtype,
        _limits(config, model, device),
        weight_format,
        kv.cls(kv_spec, kv.options),
        tuple(KVGroup(window) for window in windows),
        tuple(windows.index(window) for window in model.windows),
        [weights, kv],
    )
    _choose_attention(assembly)
    for op in OPS:
        assembly.ops[op] = assembly._choose("ops", OpSpec(op, dtype, device), config.ops_backend)
    return assembly


def _model_class(plugins: Plugins, checkpoint: Mapping[str, Any]) -> type[Decoder]:
    given = checkpoint.get("architectures") or []
    names = [str(name) for name in given] if isinstance(given, list) else [str(given)]
    for name in names:
        for provider in plugins.providers("model"):
            if provider.name == name:
                return provider.load()  # type: ignore[return-value]
    offered = ", ".join(provider.name for provider in plugins.providers("model"))
    raise CheckpointError(
        f"The checkpoint's architecture is {', '.join(names) or 'not named in config.json'}, which no plugin offers. "
        f"Offered are: {offered}."
    )


def _weight_format(
    config: EngineConfig, plugins: Plugins, checkpoint: Mapping[str, Any]
) -> tuple[Selection, WeightFormat]:
    """The format that claims the checkpoint, or is named and quantizes it. Raises PluginError, CheckpointError."""
    named = (config.quantization,) if config.quantization else ()
    refusals: list[CheckpointError] = []

    def make(cls: Any) -> WeightFormat | None:
        try:
            return cls.claim(checkpoint) or (cls.quantize(checkpoint) if named else None)
        except CheckpointError as error:
            refusals.append(error)
            raise

    def reason(provider: LoadedProvider, cls: Any, options: Any) -> str | None:
        return None if make(cls) is not None else f"the checkpoint is {_describe_quantization(checkpoint)}"

    try:
        selection = choose(plugins, "weights", checkpoint, named, build_reason=reason)
    except UnservedError:
        if refusals:  # the checkpoint is that format's, so what the others say of it is beside the point
            raise refusals[0] from None
        raise
    weight_format = make(selection.cls)
    assert weight_format is not None, "it passed its reason"
    return selection, weight_format


def _describe_quantization(checkpoint: Mapping[str, Any]) -> str:
    quantization = quantization_of(checkpoint)
    if not quantization:
        return "not quantized, and the format does not quantize while loading"
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    return f"of another format: its quant_method is {method!r}"


def _dtype(config: EngineConfig, checkpoint: Mapping[str, Any], device: DeviceInfo) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        name = str(checkpoint.get("dtype") or checkpoint.get("torch_dtype") or "float32").removeprefix("torch.")
        if name == "float32":
            name = "bfloat16"  # checkpoints in float32 were trained to be run in 16 bits
        if name == "float16" and device.type == "cpu":
            name = "bfloat16"  # CPUs have products in bfloat16, not in float16
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}, but must be one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _limits(config: EngineConfig, model: DecoderConfig, device: DeviceInfo) -> Limits:
    longest = config.max_model_len or model.max_position
    if longest > model.max_position:
        raise ConfigError(
            f"max_model_len is {longest}, but the model's positions end at {model.max_position}. "
            "Ask for no more than that."
        )
    max_requests = config.max_num_seqs or DEFAULT_MAX_REQUESTS[device.type]
    max_tokens = config.max_num_batched_tokens or max(DEFAULT_MAX_TOKENS[device.type], max_requests)
    if not config.enable_chunked_prefill:
        if config.max_num_batched_tokens and max_tokens < longest:
            raise ConfigError(
                f"max_num_batched_tokens is {max_tokens}, but without chunked prefill a step must hold a whole prompt "
                f"of max_model_len ({longest}) tokens. Raise the one, lower the other, or allow chunked prefill."
            )
        max_tokens = max(max_tokens, longest)
    return Limits(max_requests, max_tokens, longest)


def _choose_attention(assembly: Assembly) -> None:
    """An attention backend for each KV group."""
    model, limits, config = assembly.model, assembly.limits, assembly.config
    spec = AttentionSpec(
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        scale=model.head_dim**-0.5,
        dtype=assembly.dtype,
        kv_layout=assembly.cache_format.layout,
        block_size=config.block_size,
        max_requests=limits.max_requests,
        max_tokens=limits.max_tokens,
        max_model_len=limits.max_model_len,
        device=assembly.device,
        cache_format=assembly.cache_format,
    )
    for group, kv_group in enumerate(assembly.groups):
        features = {} if kv_group.window is None else {"window": kv_group.window}
        own = replace(spec, group=group, features=features)
        assembly.attention.append((_choose_for_group(assembly, own), own))


def _choose_for_group(assembly: Assembly, spec: AttentionSpec) -> Selection:
    """One backend for all batches, or two joined where the configuration names one for decode or for prefill."""
    config = assembly.config
    by_name = {"decode": config.decode_attention_backend, "prefill": config.prefill_attention_backend}
    if not any(by_name.values()):
        return assembly._choose("attention", spec, config.attention_backend, build_reason=_reads_layout(spec))
    decode, prefill = (_choose_for_phase(assembly, spec, phase, named) for phase, named in by_name.items())
    return replace(decode, cls=by_phase(decode.cls, prefill.cls, decode.options, prefill.options), options=None)


def _choose_for_phase(assembly: Assembly, spec: AttentionSpec, phase: str, named: tuple[str, ...]) -> Selection:
    """The backend that is named for the phase, else as for all batches. Raises PluginError."""
    requested = named or assembly.config.attention_backend
    try:
        selection = assembly._choose("attention", spec, requested, build_reason=_reads_layout(spec))
    except PluginError as error:
        raise PluginError(f"For {phase} (--{phase}-attention-backend): {error}") from error
    assembly.selections[-1] = PhaseSelection.of(selection, phase)
    return selection


def _reads_layout(spec: AttentionSpec) -> Any:
    def reason(provider: LoadedProvider, cls: Any, options: Any) -> str | None:
        if cls.kv_layouts is None or spec.kv_layout in cls.kv_layouts:
            return None
        return f"it reads the KV layouts {', '.join(sorted(cls.kv_layouts))}, not {spec.kv_layout}"

    return reason
