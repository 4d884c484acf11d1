"""One rank's start: select, load, size the KV cache, and put the runner together."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend
from octavo.checkpoints import open_model
from octavo.checkpoints.interface import CheckpointReader
from octavo.config import EngineConfig
from octavo.device import current_device
from octavo.distributed.interface import Communicator
from octavo.engine.executor import Capacity
from octavo.errors import ConfigError
from octavo.kv_cache.interface import KVCache
from octavo.models.builder import ModelBuilder
from octavo.models.config import rope_table
from octavo.models.decoder import Decoder
from octavo.models.layers import AttentionLayer, Ops
from octavo.plugins.kinds import KINDS
from octavo.plugins.registry import Plugins
from octavo.plugins.selection import choose
from octavo.runtime.assembly import Assembly, assemble
from octavo.runtime.buffers import BatchBuffers
from octavo.runtime.runner import Runner
from octavo.weights.loader import WeightLoader

_CPU_CACHE_BYTES = 4 << 30
_CPU_CACHE_SHARE = 0.25
_GPU_RESERVE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Worker:
    """A runner that is ready, and what it can hold."""

    runner: Runner
    capacity: Capacity


@dataclass(slots=True)
class _Phases:
    """Seconds of each phase of the start, told as they begin."""

    tell: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.tell(name)
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 3)


def start_worker(config: EngineConfig, plugins: Plugins, tell: Callable[[str], None]) -> Worker:
    """Bring up rank 0 of 1 on this process's device. Raises the errors of what it assembles."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    phases = _Phases(tell)
    device = current_device(config.device)
    with phases.phase("opening the checkpoint"):
        name, reader = open_model(config, plugins)
    with phases.phase("selecting backends"):
        assembly = assemble(config, plugins, reader.config, device)
        chosen = choose(plugins, "communicator", config.tensor_parallel_size, config.communicator)
        assembly.selections.append(chosen)
        communicator: Communicator = chosen.cls(0, 1, chosen.options)
    with phases.phase("loading weights"):
        backends = _build_backends(assembly)
        model = _build_model(assembly, backends, reader, communicator)
        eos_token_ids = _eos_token_ids(reader)
        generation_config = dict(reader.generation_config)
        weight_bytes = _weight_bytes(reader, assembly.dtype)
        reader.close()
    with phases.phase("allocating the KV cache"):
        caches, num_blocks = _allocate(assembly)
    runner = _runner(assembly, model, backends, caches, eos_token_ids)
    details = {
        "model": name,
        "dtype": str(assembly.dtype).removeprefix("torch."),
        "device": device.name,
        "backends": [selection.as_dict() for selection in assembly.selections],
        "startup_seconds": phases.seconds,
        "memory": {
            "weights": weight_bytes,
            "KV cache": num_blocks * _block_bytes(assembly),
            "attention": _attention_bytes(assembly),
        },
        "generation_config": generation_config,
        "kv_bytes_per_token": _block_bytes(assembly) / config.block_size,
    }
    return Worker(runner, _capacity(assembly, num_blocks, eos_token_ids, details))


def _capacity(assembly: Assembly, num_blocks: int, eos_token_ids: frozenset[int], details: dict[str, Any]) -> Capacity:
    limits = assembly.limits
    return Capacity(
        num_blocks=num_blocks,
        block_size=assembly.config.block_size,
        groups=assembly.groups,
        max_model_len=limits.max_model_len,
        max_requests=limits.max_requests,
        max_tokens=limits.max_tokens,
        vocab_size=assembly.model.vocab_size,
        max_steps_in_flight=1 if assembly.device.type == "cpu" else 2,
        eos_token_ids=eos_token_ids,
        details=details,
    )


def _build_backends(assembly: Assembly) -> list[AttentionBackend]:
    """An attention backend for each KV group; they share one scratch."""
    sizes = [selection.cls.scratch_bytes(spec, selection.options) for selection, spec in assembly.attention]
    scratch = torch.empty(max(sizes), dtype=torch.uint8, device=assembly.device.torch_device)
    return [selection.cls(spec, selection.options, scratch) for selection, spec in assembly.attention]


def _build_model(
    assembly: Assembly, backends: list[AttentionBackend], reader: CheckpointReader, communicator: Communicator
) -> Decoder:
    from tqdm import tqdm

    model, device = assembly.model, assembly.device.torch_device
    cos_sin = rope_table(model.rope, model.head_dim, assembly.limits.max_model_len, torch.float32, device)
    by_class: dict[type, Any] = {}
    for selection in assembly.ops.values():
        by_class.setdefault(selection.cls, selection.cls(selection.options))
    ops = Ops(**{name: by_class[selection.cls] for name, selection in assembly.ops.items()})

    def attention_layer(index: int, norms: tuple[torch.Tensor, torch.Tensor] | None) -> AttentionLayer:
        group = assembly.layer_groups[index]
        return AttentionLayer(
            index,
            group,
            model.num_heads // communicator.size,
            model.num_kv_heads // communicator.size,
            model.head_dim,
            backends[group],
            assembly.cache_format,
            cos_sin,
            ops,
            norms,
            model.norm_eps,
        )

    total = sum(info.dtype.itemsize * torch.Size(info.shape).numel() for info in reader.tensors().values())
    hidden = not assembly.config.progress or not total
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", leave=False, disable=hidden) as bar:
        rank, size = communicator.rank, communicator.size
        loader = WeightLoader(reader, assembly.dtype, device, rank, size, lambda n: bar.update(n))
        build = ModelBuilder(loader, assembly.weight_format, ops, communicator, assembly.matmul, attention_layer)
        return assembly.model_class(model, build)


def _weight_bytes(reader: CheckpointReader, dtype: torch.dtype) -> int:
    """What the checkpoint's tensors take once loaded: floating-point ones in the model's dtype."""
    sizes = ((torch.Size(one.shape).numel(), one.dtype) for one in reader.tensors().values())
    return sum(
        count * (dtype if kind.is_floating_point and kind.itemsize > 1 else kind).itemsize for count, kind in sizes
    )


def _attention_bytes(assembly: Assembly) -> int:
    """The scratch that attention backends share, and what each keeps for itself."""
    asked = [(one.cls, spec, one.options) for one, spec in assembly.attention]
    scratch = max(cls.scratch_bytes(spec, options) for cls, spec, options in asked)
    return int(scratch + sum(cls.persistent_bytes(spec, options) for cls, spec, options in asked))


def _eos_token_ids(reader: CheckpointReader) -> frozenset[int]:
    """End-of-sequence ids of both configs: generation_config's list is the longer one where they differ."""
    ids: set[int] = set()
    for config in (reader.config, reader.generation_config):
        value = config.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _allocate(assembly: Assembly) -> tuple[tuple[KVCache, ...], int]:
    """Each layer's cache, and the number of blocks. Layers of different groups share bytes: a block is one group's."""
    page_bytes = assembly.cache_format.page_bytes()
    places: list[int] = []
    for index, group in enumerate(assembly.layer_groups):
        places.append(assembly.layer_groups[:index].count(group))
    num_places = max(places) + 1
    num_blocks = _num_blocks(assembly, page_bytes * num_places)
    device = assembly.device.torch_device
    raw = [torch.empty(num_blocks, page_bytes, dtype=torch.uint8, device=device) for _ in range(num_places)]
    return tuple(assembly.cache_format.view(raw[place]) for place in places), num_blocks


def _block_bytes(assembly: Assembly) -> int:
    """Bytes of a block: a page for each layer of the largest group."""
    groups = assembly.layer_groups
    return int(assembly.cache_format.page_bytes()) * max(map(groups.count, groups))


def _num_blocks(assembly: Assembly, block_bytes: int) -> int:
    config, limits = assembly.config, assembly.limits
    per_request = -(-limits.max_model_len // config.block_size) * len(assembly.groups)
    num_blocks = config.num_gpu_blocks_override
    if num_blocks is None:
        most = per_request * limits.max_requests
        num_blocks = min(most, (config.kv_cache_memory_bytes or _cache_bytes(assembly)) // block_bytes)
    if num_blocks < per_request:
        raise ConfigError(
            f"The KV cache has room for {num_blocks} blocks of {config.block_size} tokens, but one request of "
            f"max_model_len ({limits.max_model_len}) needs {per_request}. Lower max_model_len to at most "
            f"{num_blocks // len(assembly.groups) * config.block_size}, or give the cache more memory."
        )
    return num_blocks + 1  # the null block


def _cache_bytes(assembly: Assembly) -> int:
    if assembly.device.type == "cpu":
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(_CPU_CACHE_BYTES, int(available * _CPU_CACHE_SHARE))
    free, total = torch.cuda.mem_get_info()
    return int(free - (1 - assembly.config.gpu_memory_utilization) * total) - _GPU_RESERVE_BYTES


def _runner(
    assembly: Assembly,
    model: Decoder,
    backends: list[AttentionBackend],
    caches: tuple[KVCache, ...],
    eos_token_ids: frozenset[int],
) -> Runner:
    limits, config = assembly.limits, assembly.config
    buffers = BatchBuffers(
        limits.max_requests,
        limits.max_tokens,
        -(-limits.max_model_len // config.block_size),
        config.block_size,
        len(assembly.groups),
        assembly.device.torch_device,
    )
    return Runner(
        model,
        backends,
        caches,
        assembly.layer_groups,
        buffers,
        assembly.model.vocab_size,
        eos_token_ids,
        _provider_names(assembly, backends),
    )


def _provider_names(assembly: Assembly, backends: list[AttentionBackend]) -> dict[type, str]:
    """Each class that a step runs through, with its provider; a factory's product may be of another class than it."""
    classes = [(one.cls, one) for one in assembly.selections]
    classes += [(type(backend), one) for backend, (one, _) in zip(backends, assembly.attention, strict=True)]
    return {cls: f"The {KINDS[one.kind].title} {one.chosen.name!r}" for cls, one in classes}
