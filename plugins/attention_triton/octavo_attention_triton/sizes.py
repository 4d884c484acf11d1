"""What a spec makes of its tuning: the kernels' constants, and bounds of units, tiles and bytes."""

from dataclasses import dataclass

from octavo.attention.interface import AttentionSpec

from octavo_attention_triton.options import TritonAttentionOptions
from octavo_attention_triton.tuning import DecodeTuning, PrefillTuning, Tuning, tuning_for

MIN_ROWS = 16  # of a tile that tensor cores multiply
UNIT_BYTES, TILE_BYTES, FLOAT_BYTES, INT_BYTES = 32, 32, 4, 4


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class DecodeSizes:
    """One decode setting's constants: a unit has `min_chunk` tiles at least, a batch about `budget` units.

    `splits` is the option, 0 for none.
    """

    tuning: DecodeTuning
    min_chunk: int
    budget: int
    splits: int

    @classmethod
    def of(cls, tuning: DecodeTuning, spec: AttentionSpec, options: TritonAttentionOptions) -> "DecodeSizes":
        """The sizes for a spec."""
        return cls(
            tuning,
            min_chunk=_ceil_div(options.min_keys or tuning.min_keys, tuning.block_n),
            budget=max(tuning.programs // spec.num_kv_heads, 1),
            splits=options.splits or 0,
        )

    def serves(self, num_pairs: int) -> bool:
        """Whether it is meant for so many requests times KV heads."""
        return self.tuning.max_pairs == 0 or num_pairs <= self.tuning.max_pairs

    def max_units(self, num_requests: int) -> int:
        """Units of a decode of `num_requests`, as the schedule kernel cuts it.

        In general sum of ceil(work / chunk) <= total / chunk + requests; see `_even_chunk` for few requests.
        """
        if self.splits:
            return num_requests * self.splits
        return self.budget if 2 * num_requests <= self.budget else num_requests + self.budget


@dataclass(frozen=True, slots=True)
class Sizes:
    """Constants and bounds of one spec's kernels."""

    decodes: tuple[DecodeSizes, ...]
    prefill: PrefillTuning
    num_kv_heads: int
    group: int
    block_d: int
    block_g: int
    block_m: int
    tokens_per_tile: int
    record: int

    @classmethod
    def of(cls, spec: AttentionSpec, options: TritonAttentionOptions, tuned: Tuning | None = None) -> "Sizes":
        """The sizes for a spec; `tuned` takes the place of the table's row."""
        tuning = tuned or tuning_for(spec.device.capability, spec.head_dim, spec.dtype.itemsize)
        group = spec.num_heads // spec.num_kv_heads
        block_m = max(tuning.prefill.block_m, power_of_two(group))
        return cls(
            decodes=tuple(DecodeSizes.of(one, spec, options) for one in tuning.decodes),
            prefill=tuning.prefill,
            num_kv_heads=spec.num_kv_heads,
            group=group,
            block_d=max(power_of_two(spec.head_dim), 16),
            block_g=max(power_of_two(group), MIN_ROWS),
            block_m=block_m,
            tokens_per_tile=block_m // group,
            # Two floats a row follow the sums; two more keep every record on 16 bytes.
            record=group * (spec.head_dim + 4),
        )

    def decode_index(self, num_requests: int) -> int:
        """Which of `decodes` serves so many requests."""
        pairs = num_requests * self.num_kv_heads
        return next(i for i, one in enumerate(self.decodes) if one.serves(pairs))

    def max_units(self, num_requests: int) -> int:
        """Units of a decode of `num_requests`."""
        return self.decodes[self.decode_index(num_requests)].max_units(num_requests)

    def max_tiles(self, num_tokens: int, num_requests: int) -> int:
        """Tiles of all requests and nobody's tokens: a sum of n ceil(a / t) is at most (sum of a + n (t - 1)) / t."""
        parts = min(num_requests + 1, num_tokens)
        return (num_tokens + parts * (self.tokens_per_tile - 1)) // self.tokens_per_tile

    def scratch_bytes(self, spec: AttentionSpec) -> int:
        """The partial results of all units."""
        return self._most_units(spec) * spec.num_kv_heads * self.record * FLOAT_BYTES

    def num_persistent_ints(self, spec: AttentionSpec) -> tuple[int, int, int]:
        """int32 elements of the units' table, the tiles' table and the counters."""
        units = self._most_units(spec) * (UNIT_BYTES // INT_BYTES)
        tiles = self.max_tiles(spec.max_tokens, spec.max_requests) * (TILE_BYTES // INT_BYTES)
        return units, tiles, spec.max_requests * spec.num_kv_heads

    def _most_units(self, spec: AttentionSpec) -> int:
        return max(self.max_units(n + 1) for n in range(spec.max_requests))
