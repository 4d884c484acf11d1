"""One rank's start: select, load, size the KV cache, and put the runner together."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from octavo.attention.interface import AttentionBackend
from octavo.batch import BatchShape
from octavo.checkpoints import open_model
from octavo.checkpoints.dummy import DummyReader
from octavo.checkpoints.interface import CheckpointReader
from octavo.config import EngineConfig
from octavo.device import DeviceInfo, current_device
from octavo.distributed.interface import Communicator
from octavo.engine.executor import Capacity
from octavo.kv_cache.interface import KVCache
from octavo.models.builder import ModelBuilder, NoPlace
from octavo.models.config import rope_table
from octavo.models.decoder import Decoder
from octavo.models.layers import AttentionLayer, Ops
from octavo.plugins.kinds import KINDS
from octavo.plugins.registry import Plugins
from octavo.plugins.selection import choose
from octavo.runtime.assembly import Assembly, assemble
from octavo.runtime.buffers import BatchBuffers
from octavo.runtime.calibration import largest_values
from octavo.runtime.graphs import Graphs
from octavo.runtime.kv_scales import Calibration, find_scales
from octavo.runtime.memory import Reserve, allocate_cache, attention_bytes, block_bytes, num_cache_blocks
from octavo.runtime.runner import Runner
from octavo.runtime.warmup import graph_shapes, measure_reserve, warm_up
from octavo.weights.loader import HeaderCheck, WeightLoader


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
        name, path, reader = open_model(config, plugins)
    with phases.phase("selecting backends"):
        assembly = assemble(config, plugins, reader.config, device)
        chosen = choose(plugins, "communicator", config.tensor_parallel_size, config.communicator)
        assembly.selections.append(chosen)
        communicator: Communicator = chosen.cls(0, 1, chosen.options)
        scales = find_scales(assembly, reader, path)
    with phases.phase("loading weights"):
        before = _allocated(device)
        _check_headers(assembly, reader, communicator)
        backends = _build_backends(assembly)
        layers: list[AttentionLayer] = []
        model = _build_model(assembly, backends, reader, communicator, layers)
        assembly.check_named_matmuls()
        eos_token_ids = _eos_token_ids(reader)
        generation_config = dict(reader.generation_config)
        weight_bytes = _weight_bytes(reader, assembly)
        measured = {"weights": _allocated(device) - before - attention_bytes(assembly)}
        reader.close()
    buffers = _buffers(assembly)
    if isinstance(scales, Calibration):
        with phases.phase("calibrating the KV cache"):
            scales = scales.finish(largest_values(assembly, model, layers, buffers, scales.prompts))
    make_runner = partial(_runner, assembly, model, backends, eos_token_ids, buffers)
    reserve = Reserve()
    if device.type == "cuda":
        with phases.phase("measuring a step's memory"):
            reserve = measure_reserve(make_runner(allocate_cache(assembly, 1, scales)), assembly)
    with phases.phase("allocating the KV cache"):
        num_blocks = num_cache_blocks(assembly, reserve)
        runner = make_runner(allocate_cache(assembly, num_blocks, scales))
    if device.type == "cuda":
        with phases.phase("compiling and capturing graphs"):
            measured["graphs"] = warm_up(runner, assembly, partial(_shown, config.progress))
    details = {
        "model": name,
        "dtype": str(assembly.dtype).removeprefix("torch."),
        "device": device.name,
        "backends": [selection.as_dict() for selection in assembly.selections],
        "layers": [layer.as_dict() for layer in assembly.placement.layers],
        "startup_seconds": phases.seconds,
        "memory": {
            "weights": weight_bytes,
            "KV cache": num_blocks * block_bytes(assembly),
            "attention": attention_bytes(assembly),
            "activations": reserve.activations,
            "graphs": reserve.graphs,
        },
        "memory_measured": measured if device.type == "cuda" else {},  # a CPU does not tell
        "generation_config": generation_config,
        "kv_bytes_per_token": block_bytes(assembly) / config.block_size,
        "kv_scales": scales.source if scales else "",
    }
    return Worker(runner, _capacity(assembly, num_blocks, eos_token_ids, details))


def _shown(progress: bool, shapes: Sequence[BatchShape]) -> Iterable[BatchShape]:
    """The shapes behind a progress bar."""
    from tqdm import tqdm

    return tqdm(shapes, desc="Capturing graphs", leave=False, disable=not progress or not shapes)


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


def _check_headers(assembly: Assembly, reader: CheckpointReader, communicator: Communicator) -> None:
    """Build the model from the headers of the checkpoint's tensors alone. Raises CheckpointError."""
    if isinstance(reader, DummyReader):
        return
    rank, size = communicator.rank, communicator.size
    loader = HeaderCheck(reader, assembly.dtype, torch.device("cpu"), rank, size)
    nothing: Any = None
    build = ModelBuilder(loader, assembly.weight_format, nothing, communicator, NoPlace(), lambda index, norms: nothing)
    assembly.model_class(assembly.model, build)


def _build_model(
    assembly: Assembly,
    backends: list[AttentionBackend],
    reader: CheckpointReader,
    communicator: Communicator,
    layers: list[AttentionLayer],
) -> Decoder:
    """The model with its weights; its attention layers are added to `layers`."""
    from tqdm import tqdm

    model, device = assembly.model, assembly.device.torch_device
    cos_sin = rope_table(model.rope, model.head_dim, assembly.limits.max_model_len, torch.float32, device)
    by_class: dict[type, Any] = {}
    for selection in assembly.ops.values():
        by_class.setdefault(selection.cls, selection.cls(selection.options))
    ops = Ops(**{name: by_class[selection.cls] for name, selection in assembly.ops.items()})

    def attention_layer(index: int, norms: tuple[torch.Tensor, torch.Tensor] | None) -> AttentionLayer:
        group = assembly.layer_groups[index]
        layer = AttentionLayer(
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
        layers.append(layer)
        return layer

    total = sum(info.dtype.itemsize * torch.Size(info.shape).numel() for info in reader.tensors().values())
    hidden = not assembly.config.progress or not total
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", leave=False, disable=hidden) as bar:
        rank, size = communicator.rank, communicator.size
        loader = WeightLoader(reader, assembly.dtype, device, rank, size, lambda n: bar.update(n))
        build = ModelBuilder(loader, assembly.weight_format, ops, communicator, assembly.placement, attention_layer)
        return assembly.model_class(model, build)


def _weight_bytes(reader: CheckpointReader, assembly: Assembly) -> int:
    """What the weights take: linear layers as their matmuls hold them, other tensors in the model's dtype."""
    placed = assembly.placement.layers
    linear = {name for layer in placed for name in layer.layers}
    others = (
        info
        for name, info in reader.tensors().items()
        if name.endswith(".bias") or name.rpartition(".")[0] not in linear
    )
    elements = sum(torch.Size(info.shape).numel() for info in others)
    return sum(layer.resident_bytes for layer in placed) + assembly.dtype.itemsize * elements


def _eos_token_ids(reader: CheckpointReader) -> frozenset[int]:
    """End-of-sequence ids of both configs: generation_config's list is the longer one where they differ."""
    ids: set[int] = set()
    for config in (reader.config, reader.generation_config):
        value = config.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _allocated(device: DeviceInfo) -> int:
    """Bytes of tensors on a GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _buffers(assembly: Assembly) -> BatchBuffers:
    limits, block_size = assembly.limits, assembly.config.block_size
    return BatchBuffers(
        limits.max_requests,
        limits.max_tokens,
        -(-limits.max_model_len // block_size),
        block_size,
        len(assembly.groups),
        assembly.device.torch_device,
    )


def _runner(
    assembly: Assembly,
    model: Decoder,
    backends: list[AttentionBackend],
    eos_token_ids: frozenset[int],
    buffers: BatchBuffers,
    caches: tuple[KVCache, ...],
) -> Runner:
    shapes = graph_shapes(assembly)
    return Runner(
        model,
        backends,
        caches,
        assembly.layer_groups,
        buffers,
        assembly.model.vocab_size,
        eos_token_ids,
        _provider_names(assembly, backends),
        Graphs(shapes) if shapes else None,
    )


def _provider_names(assembly: Assembly, backends: list[AttentionBackend]) -> dict[type, str]:
    """Each class that a step runs through, with its provider; a factory's product may be of another class than it."""
    classes = [(one.cls, one) for one in assembly.selections]
    classes += [(type(backend), one) for backend, (one, _) in zip(backends, assembly.attention, strict=True)]
    return {cls: f"The {KINDS[one.kind].title} {one.chosen.name!r}" for cls, one in classes}
