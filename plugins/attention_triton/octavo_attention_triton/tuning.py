"""Block sizes, warps and stages by GPU generation: plain data, found with `python -m octavo_attention_triton.tune`.

Rows are looked up by capability (the newest that is not newer than the device), padded head size and element size; the
interpreter takes the smallest tiles.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """Tiles of `block_n` keys; a unit holds `min_keys` at least; about `programs` programs when work is plenty.

    `max_pairs`: it serves batches of up to so many requests times KV heads; 0 is any number.
    `ahead`: a unit's first tiles, at most as many as there are stages, are loaded while the kernel before runs.
    """

    block_n: int
    num_warps: int
    num_stages: int
    min_keys: int
    programs: int
    max_pairs: int = 0
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    """Tiles of `block_m` rows (tokens times heads of a group) by `block_n` keys.

    `own`: keys and values of this step are read from `new` by the copy engine (TMA) where that pays.
    `max_regs`: registers a thread may take then, so that more programs fit a multiprocessor; 0 for as many as it likes.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    own: bool = False
    max_regs: int = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """The settings of both kernels. Of `decodes` a batch takes the first that serves its number of requests."""

    decodes: tuple[DecodeTuning, ...]
    prefill: PrefillTuning


@dataclass(frozen=True, slots=True)
class Row:
    """What suits heads of up to `max_head_dim` with queries of `itemsize` bytes, from `capability` on."""

    capability: tuple[int, int]
    max_head_dim: int
    itemsize: int
    tuning: Tuning


def _row(capability: tuple[int, int], head_dim: int, itemsize: int, prefill: PrefillTuning, *d: DecodeTuning) -> Row:
    return Row(capability, head_dim, itemsize, Tuning(d, prefill))


_SMALL = DecodeTuning(16, 4, 1, 16, 64, ahead=True)  # so that the interpreter runs that path

# float32 has no tensor-core product that is exact enough: small tiles spare registers.
TABLE = (
    _row((0, 0), 256, 4, PrefillTuning(16, 16, 4, 1), _SMALL),
    _row((0, 0), 256, 2, PrefillTuning(16, 16, 4, 1, own=True), _SMALL),
    _row((8, 0), 256, 4, PrefillTuning(32, 16, 4, 1), DecodeTuning(16, 4, 2, 64, 1024)),
    _row((8, 0), 64, 4, PrefillTuning(32, 32, 4, 1), DecodeTuning(32, 4, 2, 64, 1024)),
    _row((8, 0), 256, 2, PrefillTuning(64, 32, 4, 2), DecodeTuning(32, 4, 2, 64, 1024)),
    _row((8, 0), 128, 2, PrefillTuning(128, 64, 8, 2), DecodeTuning(32, 4, 3, 64, 1024)),
    _row((8, 0), 64, 2, PrefillTuning(128, 64, 4, 3), DecodeTuning(64, 4, 3, 128, 1024)),
    _row((9, 0), 256, 2, PrefillTuning(128, 32, 8, 2), DecodeTuning(32, 4, 2, 64, 1056)),
    _row(
        (9, 0),
        128,
        2,
        PrefillTuning(128, 64, 8, 2, own=True, max_regs=128),
        # `programs` run at once. The fourth has up to 66 requests in one round; beyond it the fifth's two are quicker.
        DecodeTuning(16, 1, 3, 32, 528, max_pairs=128, ahead=True),
        DecodeTuning(64, 4, 4, 128, 264, max_pairs=264, ahead=True),
        DecodeTuning(64, 4, 3, 128, 396, max_pairs=396, ahead=True),
        DecodeTuning(64, 4, 2, 128, 528, max_pairs=528),
        DecodeTuning(64, 4, 3, 128, 396, max_pairs=792, ahead=True),
        DecodeTuning(64, 4, 2, 128, 1056),
    ),
    _row((9, 0), 64, 2, PrefillTuning(128, 128, 8, 3), DecodeTuning(64, 4, 3, 128, 1056)),
)


def tuning_for(capability: tuple[int, int], head_dim: int, itemsize: int) -> Tuning:
    """The pinned settings for a device, head size and bytes of a query's element."""
    fitting = [
        row
        for row in TABLE
        if row.capability <= capability and row.max_head_dim >= head_dim and row.itemsize == itemsize
    ]
    newest = max(row.capability for row in fitting)
    return min((row for row in fitting if row.capability == newest), key=lambda row: row.max_head_dim).tuning
