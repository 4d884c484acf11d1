"""The hook module of the native_cpu plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_attention_backends() -> list[Provider]:
    """Offer decode attention in C."""
    return [
        Provider(
            name="native",
            factory="octavo_native_cpu.attention:NativeAttention",
            summary="decode attention for CPUs in C, compiled at first use; prompts by torch",
            priority=10,
        )
    ]


@hookimpl
def octavo_fused_ops() -> list[Provider]:
    """Offer the fused operators in C."""
    return [
        Provider(
            name="native",
            factory="octavo_native_cpu.ops:NativeOps",
            summary="fused operators for CPUs in C, compiled at first use",
            priority=10,
        )
    ]


@hookimpl
def octavo_matmuls() -> list[Provider]:
    """Offer oneDNN's products, and torch's of codes with few bits."""
    return [
        Provider(
            name="onednn",
            factory="octavo_native_cpu.onednn:OneDNNMatmul",
            summary="dense products on the CPU by oneDNN",
            priority=10,
        ),
        Provider(
            name="torch_int4",
            factory="octavo_native_cpu.few_bits:Int4Matmul",
            summary="4-bit weights on the CPU in a fourth of the memory; slow with many tokens",
            automatic=False,
        ),
        Provider(
            name="torch_int8",
            factory="octavo_native_cpu.few_bits:Int8Matmul",
            summary="8-bit weights on the CPU in half of the memory; slow with many tokens",
            automatic=False,
        ),
    ]
