"""The hook module of the quant_gptq plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_weight_formats() -> list[Provider]:
    """Offer GPTQ's checkpoint format."""
    return [
        Provider(
            name="gptq",
            factory="octavo_quant_gptq.format:GPTQ",
            summary="GPTQ checkpoints: integers of 2, 3, 4 or 8 bits in groups, in any order of activations",
        )
    ]
