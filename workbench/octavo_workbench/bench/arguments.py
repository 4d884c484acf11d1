"""Types of the benchmarks' arguments: text to value, or a sentence why not."""

from argparse import ArgumentTypeError


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positives(text: str) -> list[int]:
    """Whole numbers above 0 with commas between them."""
    return [positive(part.strip()) for part in text.split(",")]


def ratio(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def ratios(text: str) -> list[float]:
    """Numbers above 0 with commas between them."""
    return [ratio(part.strip()) for part in text.split(",")]
