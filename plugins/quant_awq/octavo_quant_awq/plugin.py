"""The hook module of the quant_awq plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_weight_formats() -> list[Provider]:
    """Offer AWQ's checkpoint format."""
    return [
        Provider(
            name="awq",
            factory="octavo_quant_awq.format:AWQ",
            summary="AWQ checkpoints: 4-bit integers in groups (gemm, gemv, gemv_fast)",
        )
    ]
