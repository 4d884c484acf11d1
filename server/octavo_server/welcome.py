"""What `octavo serve` says once it is ready: what was selected and why, what takes the memory, and where to ask."""

import json
import socket
from collections.abc import Sequence
from typing import Any

from octavo.admission import EngineInfo
from octavo.plugins.kinds import KINDS

from octavo_server.settings import ServerSettings

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_LOOPBACK = ("127.", "::1")


def welcome(
    info: EngineInfo, listener: socket.socket, settings: ServerSettings, seconds: float, *, guarded: bool
) -> str:
    """The text; `guarded` is whether requests need a key, `seconds` what the start took."""
    lines = [
        *selection_lines(info.backends),
        *layer_lines(info.layers),
        *memory_lines(info),
        f"{info.model} ({info.dtype}, {info.device}), context {info.max_model_len} tokens, "
        f"KV cache {info.num_blocks * info.block_size} tokens.",
        *([f"KV cache scales: {info.kv_scales}."] if info.kv_scales else []),
        *_warnings(listener, settings, guarded),
        f"Ready after {seconds:.1f} s at {_shown_address(listener, settings)}. Try it:",
        "",
        _curl(listener, settings, guarded),
        "",
    ]
    return "\n".join(lines)


def selection_lines(backends: Sequence[dict[str, Any]]) -> list[str]:
    """Each selection with its options, and the other candidates with their reasons; equal ones once."""
    blocks = dict.fromkeys("\n".join(_selection(one)) for one in backends)
    return [line for block in blocks for line in block.splitlines()]


def _selection(one: dict[str, Any]) -> list[str]:
    title = KINDS[one["kind"]].title if one["kind"] in KINDS else one["kind"]
    options = ", ".join(f"{name}={value}" for name, value in one["options"].items())
    chosen = f"{title}: {one['name']}{f' ({options})' if options else ''}"
    others = [other for other in one["candidates"] if not other["chosen"]]
    return [
        f"{chosen} [{one['plugin']}, {one['distribution']} {one['version']}]",
        *(f"    not {other['name']} [{other['plugin']}]: {other['reason']}" for other in others),
    ]


def layer_lines(layers: Sequence[dict[str, Any]]) -> list[str]:
    """How many linear layers have which weight and matmul, their bytes, and why they were dequantized if they were."""
    groups: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for one in layers:
        groups.setdefault((one["weight"], one["matmul"], one["fallback"]), []).append(one)
    lines = [f"{_num_layers(layers)} linear layers:"] if layers else []
    for (weight, matmul, fallback), members in groups.items():
        stored, resident = (sum(one[name] for one in members) for name in ("stored_bytes", "resident_bytes"))
        sizes = f"{_mib(stored)} stored, {_mib(resident)} in memory"
        served = matmul if fallback is None else f"dequantized at load, {matmul}"
        lines.append(f"    {_num_layers(members)} x {weight} -> {served} ({sizes})")
        if fallback is not None:
            lines.append(f"        because: {fallback}")
    return lines


def _num_layers(entries: Sequence[dict[str, Any]]) -> int:
    """Layers of the checkpoint; those that are computed together are one entry."""
    return sum(len(one["layers"]) for one in entries)


def memory_lines(info: EngineInfo) -> list[str]:
    """What takes memory, in planned bytes, and the sum; beside it what was measured."""
    entries = {name: number for name, number in info.memory.items() if number}
    if not entries:
        return []
    entries["together"] = sum(entries.values())
    width = max(map(len, entries))
    measured = {name: f", measured {_mib(number)}" for name, number in info.memory_measured.items() if number}
    lines = (f"    {name.ljust(width)} {_mib(number):>14}{measured.get(name, '')}" for name, number in entries.items())
    return ["Memory:", *lines]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"


def _warnings(listener: socket.socket, settings: ServerSettings, guarded: bool) -> list[str]:
    if guarded or settings.uds is not None or str(listener.getsockname()[0]).startswith(_LOOPBACK):
        return []
    return ["Warning: whoever reaches this address may use the server: --api-key-file asks for keys."]


def _url(host: str, port: int, scheme: str) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _shown_address(listener: socket.socket, settings: ServerSettings) -> str:
    if settings.uds is not None:
        return settings.uds
    host, port = listener.getsockname()[:2]
    return _url(host, port, settings.scheme)


def _curl(listener: socket.socket, settings: ServerSettings, guarded: bool) -> str:
    body = {"messages": [{"role": "user", "content": "Name the capital of France."}], "temperature": 0}
    if settings.uds is not None:
        url, flags = f"{settings.scheme}://localhost", f" --unix-socket {settings.uds}"
    else:
        host, port = listener.getsockname()[:2]
        url, flags = _url(_EVERYWHERE.get(host, host), port, settings.scheme), ""
    key = ' -H "Authorization: Bearer $OCTAVO_API_KEY"' if guarded else ""
    return f"curl{flags} {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
