"""The workbench's plugin: adds `octavo bench` and `octavo compare`. Imports nothing heavy."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_commands() -> list[Provider]:
    """The commands that the workbench brings."""
    return [
        Provider(
            name="bench",
            factory="octavo_workbench.bench:BenchCommand",
            summary="measure speed, KV-cache waste and prefix caching",
        ),
        Provider(
            name="compare",
            factory="octavo_workbench.compare:CompareCommand",
            summary="compare kernels: errors against float64, then speed",
        ),
    ]
