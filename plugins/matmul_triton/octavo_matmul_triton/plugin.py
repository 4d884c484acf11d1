"""The hook module of the matmul_triton plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_matmuls() -> list[Provider]:
    """Offer products of dense weights with few tokens in Triton, and with many in torch."""
    return [
        Provider(
            name="triton",
            factory="octavo_matmul_triton.matmul:TritonMatmul",
            summary="dense products of few tokens in Triton, of more in cuBLAS",
            priority=20,
        )
    ]
