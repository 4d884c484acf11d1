"""The hook module of the kv_fp8 plugin: what it offers, without importing it."""

from octavo import Provider, hookimpl

_FORMATS = {
    "fp8": ("Float8E4M3", "8-bit floats of 3 mantissa bits, up to 448 times a scale for each head"),
    "fp8_e4m3": ("Float8E4M3", "the same as fp8"),
    "fp8_e5m2": ("Float8E5M2", "8-bit floats of 2 mantissa bits, up to 57,344 times a scale for each head"),
    "int8": ("Int8", "8-bit integers, up to 127 times a scale for each head"),
}


@hookimpl
def octavo_kv_cache_formats() -> list[Provider]:
    """Offer the 8-bit formats, behind all that keep keys and values as they are."""
    return [
        Provider(name=name, factory=f"octavo_kv_fp8.formats:{cls}", summary=summary, priority=-10)
        for name, (cls, summary) in _FORMATS.items()
    ]
