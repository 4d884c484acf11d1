"""How many tokens a GPU computes products for: so few different numbers that the start can run them all.

Libraries choose a product's kernel by that number and load it when they first choose it, which waits for all that the
device has been given: in a long step, until it ends.
"""

_DENSE = 512  # up to here a few tokens more or less are a good part of a product's time


def roomy(number: int, most: int | None = None) -> int:
    """`number` tokens or a few more, but no more than `most` where that is given.

    That is 1, 2, 4 or a multiple of 8, beyond 512 of 128, and from 16,384 on of a 64th of the next lower power of two:
    the time that the start takes to run all of them must not grow with the square of `most`.
    """
    if number <= 8:
        room = 1 << (number - 1).bit_length() if number else 0
    else:
        step = 8 if number <= _DENSE else max(128, 1 << (number.bit_length() - 7))
        room = -(-number // step) * step
    return room if most is None else min(room, most)


def all_sizes(most: int) -> list[int]:
    """Every result of `roomy` but 0."""
    return sorted({roomy(number, most) for number in range(1, most + 1)})
