"""The hook module of the quant_fp8 plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl


@hookimpl
def octavo_weight_formats() -> list[Provider]:
    """Offer the two FP8 formats that Hugging Face and vLLM read."""
    return [
        Provider(
            name="fp8",
            factory="octavo_quant_fp8.fp8:Fp8",
            summary="FP8 with a scale for each block or tensor; quantizes dense checkpoints by row",
        ),
        Provider(
            name="fbgemm_fp8",
            factory="octavo_quant_fp8.fbgemm:FbgemmFp8",
            summary="FP8 with a scale for each row",
        ),
    ]
