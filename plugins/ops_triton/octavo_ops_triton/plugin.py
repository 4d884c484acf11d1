"""The hook module of the ops_triton plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_fused_ops() -> list[Provider]:
    """Offer norms, the gated activation and rotary embeddings in Triton."""
    return [
        Provider(
            name="triton",
            factory="octavo_ops_triton.ops:TritonOps",
            summary="one short Triton kernel an op, for NVIDIA GPUs",
            priority=20,
        )
    ]
