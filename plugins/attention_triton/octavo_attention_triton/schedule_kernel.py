"""The kernel that a plan launches: it cuts a batch into the decode kernel's units and the prefill kernel's tiles."""
# mypy: disallow-untyped-decorators=False

import triton
import triton.language as tl

UNIT_FIELDS = 8  # request, token, first key, end of keys, place among the request's units, their number, seq_len, 0
TILE_FIELDS = 8  # request, first token, its position, number of tokens, the request's tokens before this step, 0, 0, 0

_AT_ONCE = tl.constexpr(32)
_SIZES = tl.constexpr(16)


@triton.jit
def _pick(values: tl.tensor, where: tl.tensor) -> tl.tensor:
    return tl.sum(tl.where(where, values, 0))


@triton.jit
def _even_chunk(work: tl.tensor, decodes: tl.tensor, MIN_CHUNK: tl.constexpr, BUDGET: tl.constexpr) -> tl.tensor:
    """The smallest of some sizes in steps of an eighth for which all units are BUDGET at most, else the first of them.

    The first is an even share of all work. Up to BUDGET / 2 requests twice that always fits.
    """
    eighths = 8 + tl.arange(0, _SIZES)
    sizes = tl.maximum(tl.cdiv(tl.sum(work) * eighths, 8 * BUDGET), MIN_CHUNK)
    counts = tl.where(decodes[None, :], tl.maximum(tl.cdiv(work[None, :], sizes[:, None]), 1), 0)
    fitting = tl.where(tl.sum(counts, 1) <= BUDGET, sizes, 1 << 30)
    best = tl.min(fitting)
    return tl.where(best < 1 << 30, best, tl.min(sizes))


@triton.jit
def _store_units(
    units: tl.tensor,
    base: tl.tensor,
    count: tl.tensor,
    num_units: tl.tensor,
    request: tl.tensor,
    token: tl.tensor,
    first_key: tl.tensor,
    chunk: tl.tensor,
    splits: tl.tensor,
    seq_len: tl.tensor,
) -> None:
    """Units `base` to `base + count`: `chunk` keys each; those with `splits` 0 have no work."""
    for begin in range(0, count, _AT_ONCE):
        index = begin + tl.arange(0, _AT_ONCE)
        mask = (index < count) & (base + index < num_units)
        place = units + (base + index) * 8
        key = first_key + index * chunk
        zero = index * 0
        tl.store(place, zero + request, mask)
        tl.store(place + 1, zero + token, mask)
        tl.store(place + 2, key, mask)
        tl.store(place + 3, tl.minimum(key + chunk, seq_len), mask)
        tl.store(place + 4, index, mask)
        tl.store(place + 5, zero + splits, mask)
        tl.store(place + 6, zero + seq_len, mask)


@triton.jit
def _store_tiles(
    tiles: tl.tensor,
    base: tl.tensor,
    count: tl.tensor,
    num_tiles: tl.tensor,
    request: tl.tensor,
    token: tl.tensor,
    num_tokens: tl.tensor,
    position: tl.tensor,
    keyless: tl.tensor,
    TOKENS: tl.constexpr,
) -> None:
    """Tiles `base` to `base + count` of `num_tokens` tokens from `token` on, the last ones first: they have most keys.

    `keyless` ones see no key: their position is such that they end at 0.
    """
    for begin in range(0, count, _AT_ONCE):
        index = begin + tl.arange(0, _AT_ONCE)
        mask = (index < count) & (base + index < num_tiles)
        place = tiles + (base + index) * 8
        offset = (count - 1 - index) * TOKENS
        mine = tl.minimum(tl.maximum(num_tokens - offset, 0), TOKENS)
        tl.store(place, index * 0 + request, mask)
        tl.store(place + 1, token + offset, mask)
        tl.store(place + 2, tl.where(keyless, -mine, position + offset), mask)
        tl.store(place + 3, mine, mask)
        tl.store(place + 4, index * 0 + position, mask)


@triton.jit(
    do_not_specialize=["num_requests", "num_tokens", "num_units", "num_tiles", "decode_len"],
    do_not_specialize_on_alignment=["query_start", "seq_lens"],
)
def schedule_kernel(
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    units: tl.tensor,
    tiles: tl.tensor,
    num_requests: tl.tensor,
    num_tokens: tl.tensor,
    num_units: tl.tensor,
    num_tiles: tl.tensor,
    decode_len: tl.tensor,
    MAX_REQUESTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BUDGET: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Program r writes the units or tiles of request r; program `num_requests` those of nobody's tokens, and the rest.

    Requests of `decode_len` tokens get units of keys, all others tiles of TOKENS tokens. A unit holds at least
    MIN_CHUNK tiles of BLOCK_N keys, and enough that the batch has BUDGET units at most, or as many more as it has
    requests where those are many; or SPLITS units a request.
    """
    mine = tl.program_id(0)
    requests = tl.arange(0, MAX_REQUESTS)
    live = requests < num_requests
    starts = tl.load(query_start + requests, mask=live, other=0)
    lens = tl.load(query_start + requests + 1, mask=live, other=0) - starts
    seqs = tl.load(seq_lens + requests, mask=live, other=0)
    decodes = live & (lens == decode_len)
    firsts = tl.maximum(seqs - WINDOW, 0) // BLOCK_N if WINDOW else seqs * 0
    work = tl.where(decodes, tl.cdiv(seqs, BLOCK_N) - firsts, 0)
    if SPLITS:
        chunks = tl.maximum(tl.cdiv(work, SPLITS), 1)
    else:
        even = _even_chunk(work, decodes, MIN_CHUNK, BUDGET)
        # An H200 merges eight records in a tile's time: n tiles in units of c take c + n / 8c, least at sqrt(n / 8).
        least = tl.maximum(even, tl.ceil(tl.sqrt_rn(work.to(tl.float32) / 8)).to(tl.int32))
        # A request's units are made alike, so that none of them is a short rest.
        chunks = tl.maximum(tl.cdiv(work, tl.maximum(tl.cdiv(work, least), 1)), 1)
    splits = tl.where(decodes, tl.maximum(tl.cdiv(work, chunks), 1), 0)
    tile_counts = tl.where(live & (lens > 0) & (lens != decode_len), tl.cdiv(lens, TOKENS), 0)

    before, here = requests < mine, requests == mine
    token, length, seq_len = _pick(starts, here), _pick(lens, here), _pick(seqs, here)
    unit_base, tile_base = _pick(splits, before), _pick(tile_counts, before)
    num_splits, my_tiles = _pick(splits, here), _pick(tile_counts, here)
    my_units = num_splits
    last = mine == num_requests
    if last:
        token = tl.load(query_start + num_requests)
        length = num_tokens - token
        my_units, my_tiles = num_units - unit_base, num_tiles - tile_base
    first_key, chunk = _pick(firsts, here) * BLOCK_N, _pick(chunks, here) * BLOCK_N
    _store_units(units, unit_base, my_units, num_units, mine, token, first_key, chunk, num_splits, seq_len)
    request = tl.where(last, 0, mine)
    _store_tiles(tiles, tile_base, my_tiles, num_tiles, request, token, length, seq_len - length, last, TOKENS)
