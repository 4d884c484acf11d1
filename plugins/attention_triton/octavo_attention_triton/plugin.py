"""The hook module of the Triton attention plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl

from octavo_attention_triton.options import TritonAttentionOptions


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    """Offer the paged-attention kernels."""
    return [
        Provider(
            name="triton",
            factory="octavo_attention_triton.backend:TritonAttention",
            summary="paged attention in Triton: split-KV decode and tensor-core prefill, on NVIDIA GPUs from Ampere on",
            priority=20,
            options=TritonAttentionOptions,
        )
    ]
