"""Python's garbage collector in a process that has started all it will and then serves."""

import gc


def spare_garbage_collection(young: int = 20_000, middle: int = 50, old: int = 100) -> None:
    """Let collections leave out what there is, and come seldom. For a process with nothing else in it.

    `young` is by how many objects there may be more before the newest are looked at, `middle` and `old` after how many
    such looks older ones are. Until then cycles stay, such as those of errors.

    What the start has made stays, and a full collection would look at it for a large part of a second. A step of many
    requests makes thousands of objects that die without one: looking for garbage every 700 took a tenth of its time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(young, middle, old)
