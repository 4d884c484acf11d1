"""The hook module of the quant_compressed_tensors plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_weight_formats() -> list[Provider]:
    """Offer the formats of compressed-tensors, which one config.json may mix."""
    return [
        Provider(
            name="compressed-tensors",
            factory="octavo_quant_compressed_tensors.format:CompressedTensors",
            summary="FP8, 8-bit integers and packed integers as llm-compressor writes them",
        )
    ]
