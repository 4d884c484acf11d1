"""GET /v1/backends: which provider serves what, and why not the others."""

from typing import Any

from octavo.admission import EngineInfo


def describe_backends(info: EngineInfo) -> dict[str, Any]:
    """Every selection of the engine's start with its candidates; `uses` counts those that came out the same.

    `kv_scales` says where the KV cache's scales come from, empty where it has none. `layers` are the linear layers: the
    weight as the checkpoint has it, the matmul, bytes as stored and in memory, and under `fallback` why it was
    dequantized, null where it was not.
    """
    selections: list[dict[str, Any]] = []
    for selection in info.backends:
        known = next((one for one in selections if one == selection | {"uses": one["uses"]}), None)
        if known is None:
            selections.append(selection | {"uses": 1})
        else:
            known["uses"] += 1
    facts = {"model": info.model, "device": info.device, "dtype": info.dtype, "kv_scales": info.kv_scales}
    return {"object": "list", **facts, "data": selections, "layers": info.layers}
