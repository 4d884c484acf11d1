"""GET /v1/backends: which provider serves what, and why not the others."""

from typing import Any

from octavo.admission import EngineInfo


def describe_backends(info: EngineInfo) -> dict[str, Any]:
    """Every selection of the engine's start with its candidates; `uses` counts those that came out the same."""
    selections: list[dict[str, Any]] = []
    for selection in info.backends:
        known = next((one for one in selections if one == selection | {"uses": one["uses"]}), None)
        if known is None:
            selections.append(selection | {"uses": 1})
        else:
            known["uses"] += 1
    return {"object": "list", "model": info.model, "device": info.device, "dtype": info.dtype, "data": selections}
