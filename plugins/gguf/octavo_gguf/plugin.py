"""The hook module of the gguf plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_checkpoint_readers() -> list[Provider]:
    """Offer the reader of GGUF files."""
    return [
        Provider(
            name="gguf",
            factory="octavo_gguf.reader:GGUFReader",
            summary="GGUF files of llama and qwen2 models, dequantized when read",
        )
    ]
