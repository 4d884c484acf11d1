"""From a configuration to a running engine. What is heavy is imported when it is called."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from octavo.admission import EngineInfo
from octavo.config import EngineConfig
from octavo.engine.executor import Capacity, Executor
from octavo.engine.loop import Engine
from octavo.engine.scheduler import SchedulerLimits
from octavo.plugins.loading import load_plugins
from octavo.plugins.registry import Plugins
from octavo.plugins.selection import Selection, choose

if TYPE_CHECKING:
    from octavo.device import DeviceInfo


def start_engine(config: EngineConfig, progress: Callable[[str], None] | None = None) -> tuple[Engine, EngineInfo]:
    """Load the plugins, start the executor that they offer, and put the engine on it.

    `progress` is told each phase as it begins. Raises ConfigError, PluginError or CheckpointError.
    """
    plugins = load_plugins(config.plugins, config.disable_plugin)
    chosen = choose(
        plugins,
        "executor",
        config.tensor_parallel_size,
        config.distributed_executor_backend,
        strict=config.strict_backends,
    )
    executor: Executor = chosen.cls(chosen.options)
    capacity = executor.start(config, plugins, progress or (lambda phase: None))
    engine = Engine(
        executor,
        capacity,
        limits=_limits(config, capacity),
        prefix_caching=config.enable_prefix_caching,
        max_steps_in_flight=config.max_steps_in_flight,
        max_logprobs=config.max_logprobs,
        seed=config.seed,
    )
    plugins.engine_started(engine)
    engine.on_shutdown = lambda: plugins.engine_stopped(engine)
    return engine, _info(capacity, chosen)


def _limits(config: EngineConfig, capacity: Capacity) -> SchedulerLimits:
    return SchedulerLimits(
        max_requests=capacity.max_requests,
        max_tokens=capacity.max_tokens,
        max_tokens_per_prompt=config.long_prefill_token_threshold,
        chunked_prefill=config.enable_chunked_prefill,
        by_priority=config.scheduling_policy == "priority",
    )


def _info(capacity: Capacity, executor: Selection) -> EngineInfo:
    details = dict(capacity.details)
    details["backends"] = [executor.as_dict(), *details["backends"]]
    return EngineInfo(
        max_model_len=capacity.max_model_len,
        max_requests=capacity.max_requests,
        vocab_size=capacity.vocab_size,
        num_blocks=capacity.num_blocks,
        block_size=capacity.block_size,
        **details,
    )


def explain(config: EngineConfig, plugins: Plugins, device: "DeviceInfo") -> list[Selection]:
    """Every selection for the model on a device, without loading weights. Raises as `start_engine` does."""
    from octavo.checkpoints import open_model
    from octavo.runtime.assembly import assemble
    from octavo.weights.canonical import Dense
    from octavo.weights.unquantized import Unquantized

    executor = choose(plugins, "executor", config.tensor_parallel_size, config.distributed_executor_backend)
    reader = open_model(config, plugins).reader
    try:
        assembly = assemble(config, plugins, reader.config, device)
    finally:
        reader.close()
    model = assembly.model
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if isinstance(assembly.weight_format, Unquantized):  # what quantized layers are is known once they are loaded
        assembly.placement.matmul(Dense, (q + 2 * kv, model.hidden_size), {})
    communicator = choose(plugins, "communicator", config.tensor_parallel_size, config.communicator)
    return [executor, *assembly.selections, communicator]
