"""The hook module of the quant_int8 plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_weight_formats() -> list[Provider]:
    """Offer quantization to 8-bit integers."""
    return [
        Provider(
            name="int8",
            factory="octavo_quant_int8.int8:Int8",
            summary="quantizes dense checkpoints to 8-bit integers by row",
        )
    ]
