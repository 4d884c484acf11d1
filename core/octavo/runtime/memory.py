"""How much memory what takes: the KV cache gets what is left of the device's share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from octavo.errors import ConfigError
from octavo.kv_cache.interface import KVCache, KVCacheFormat
from octavo.kv_cache.scales import KVScales
from octavo.runtime.assembly import Assembly

_CPU_CACHE_BYTES = 4 << 30
_CPU_CACHE_SHARE = 0.25
GRAPH_BYTES = 2 << 20
"""What the driver keeps for a graph, above the pool that all graphs share (measured: 1 to 2 MiB)."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes that a GPU needs beside weights and cache: a step's peak above what stays, and what graphs will take."""

    activations: int = 0
    graphs: int = 0


def allocate_cache(assembly: Assembly, num_blocks: int, scales: KVScales | None = None) -> tuple[KVCache, ...]:
    """Each layer's cache; with scales they count what they clip and write, all in one tensor. Raises ConfigError."""
    cache_format, device = assembly.cache_format, assembly.device.torch_device
    try:
        pages = allocate_pages(cache_format, assembly.layer_groups, num_blocks, device)
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one; a CPU's allocator has none of its own
        raise ConfigError(
            f"A KV cache of {num_blocks} blocks takes {num_blocks * block_bytes(assembly) / 2**30:.1f} GiB, which "
            f"{assembly.device.name} has not left. Lower kv_cache_memory_bytes or num_gpu_blocks_override, or leave "
            "both out, so that the cache gets what fits."
        ) from error
    if scales is None:
        return tuple(cache_format.view(one) for one in pages)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    pairs = zip(pages, scales.values.to(device), strict=True)
    return tuple(replace(cache_format.view(one, own), counts=counts) for one, own in pairs)


def allocate_pages(
    cache_format: KVCacheFormat, groups: Sequence[int], num_blocks: int, device: torch.device
) -> list[torch.Tensor]:
    """Each layer's pages uint8 [N, page_bytes]. Layers of different groups share bytes: a block is one group's."""
    places = [groups[:index].count(group) for index, group in enumerate(groups)]
    size = (num_blocks, cache_format.page_bytes())
    raw = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(max(places) + 1)]
    return [raw[place] for place in places]


def block_bytes(assembly: Assembly) -> int:
    """Bytes of a block: a page for each layer of the largest group."""
    groups = assembly.layer_groups
    return int(assembly.cache_format.page_bytes()) * max(map(groups.count, groups))


def num_cache_blocks(assembly: Assembly, reserve: Reserve) -> int:
    """Blocks of the cache, the null block included. Raises ConfigError when not even one request fits."""
    config, limits = assembly.config, assembly.limits
    per_request = -(-limits.max_model_len // config.block_size) * len(assembly.groups)
    num_blocks = config.num_gpu_blocks_override
    if num_blocks is None:
        most = per_request * limits.max_requests
        room = config.kv_cache_memory_bytes or _free_bytes(assembly, reserve)
        num_blocks = min(most, room // block_bytes(assembly) - 1)
    if num_blocks < len(assembly.groups):
        raise ConfigError(
            f"No memory is left for the KV cache, of which a block takes {block_bytes(assembly)} bytes. "
            f"Raise gpu_memory_utilization ({config.gpu_memory_utilization}) or kv_cache_memory_bytes, "
            "end what else uses the device, or take a smaller model."
        )
    if num_blocks < per_request:
        raise ConfigError(
            f"The KV cache has room for {num_blocks} blocks of {config.block_size} tokens, but one request of "
            f"max_model_len ({limits.max_model_len}) needs {per_request}. Lower max_model_len to at most "
            f"{num_blocks // len(assembly.groups) * config.block_size}, or give the cache more memory."
        )
    return num_blocks + 1  # the null block


def _free_bytes(assembly: Assembly, reserve: Reserve) -> int:
    if assembly.device.type == "cpu":
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(_CPU_CACHE_BYTES, int(available * _CPU_CACHE_SHARE))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    unused = free - (1 - assembly.config.gpu_memory_utilization) * total
    return max(0, int(unused) - reserve.activations - reserve.graphs)


def attention_bytes(assembly: Assembly) -> int:
    """The scratch that attention backends share, and what each keeps for itself."""
    asked = [(one.cls, spec, one.options) for one, spec in assembly.attention]
    scratch = max(cls.scratch_bytes(spec, options) for cls, spec, options in asked)
    return int(scratch + sum(cls.persistent_bytes(spec, options) for cls, spec, options in asked))
