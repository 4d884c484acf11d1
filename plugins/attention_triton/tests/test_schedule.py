"""How a plan cuts a batch: every key of a decode and every token of a prompt is somebody's, once."""

from collections.abc import Sequence
from random import Random

import pytest
import torch
from octavo.testing.attention import make_case, make_spec
from octavo_attention_triton.backend import TritonAttention
from octavo_attention_triton.options import TritonAttentionOptions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="On a GPU the kernels are compiled: test_gpu.py.")

Requests = Sequence[tuple[int, int]]


def _planned(
    requests: Requests, options: TritonAttentionOptions, window: int = 0, padding: int = 0
) -> tuple[TritonAttention, list[list[int]], list[list[int]]]:
    """The backend with the rows of its units and tiles that have work."""
    spec = make_spec(num_heads=2, num_kv_heads=1, head_dim=16, window=window)
    case = make_case(spec, requests, padding_tokens=padding)
    scratch = torch.empty(TritonAttention.scratch_bytes(spec, options), dtype=torch.uint8)
    backend = TritonAttention(spec, options, scratch)
    backend.units.fill_(-7)
    backend.tiles.fill_(-7)
    geometry = backend.plan(case.batch).geometry
    units = backend.units.view(-1, 8)[: geometry.decode_grid[1] if geometry.decode_grid else 0]
    tiles = backend.tiles.view(-1, 8)[: geometry.prefill_grid[1] if geometry.prefill_grid else 0]
    assert (units[:, 5] >= 0).all() and (tiles[:, 3] >= 0).all(), "rows of the grids are left as they were"
    return backend, units[units[:, 5] > 0].tolist(), tiles[tiles[:, 3] > 0].tolist()


def _random_requests(seed: int) -> tuple[list[tuple[int, int]], int]:
    random = Random(seed)
    decodes = [(1, random.randrange(1, 300)) for _ in range(random.randrange(6))]
    queries = [random.randrange(2, 60) for _ in range(random.randrange(4))]
    return [*decodes, *((n, n + random.randrange(40)) for n in queries)], random.randrange(20)


@pytest.mark.parametrize("seed", range(12))
def test_units_cover_all_keys_and_tiles_all_tokens(seed: int) -> None:
    requests, padding = _random_requests(seed)
    window = (0, 50)[seed % 2]
    splits = (None, 3)[seed // 2 % 2]
    backend, units, tiles = _planned(requests, TritonAttentionOptions(splits=splits), window, padding)
    block_n = backend.sizes.decodes[0].tuning.block_n
    decodes = [i for i, (n, _) in enumerate(requests) if n == 1]
    assert [unit[0] for unit in units] == sorted(unit[0] for unit in units)
    for i in decodes:
        seq_len, mine = requests[i][1], [unit for unit in units if unit[0] == i]
        first = max(seq_len - window, 0) // block_n * block_n if window else 0
        assert [unit[4:7] for unit in mine] == [[j, len(mine), seq_len] for j in range(len(mine))]
        assert [unit[2] for unit in mine] == [first, *(unit[3] for unit in mine[:-1])]
        assert mine[-1][3] == seq_len and all(unit[2] < unit[3] for unit in mine)
        assert splits is None or len(mine) <= splits
    assert all(tile[4] == requests[tile[0]][1] - requests[tile[0]][0] for tile in tiles if tile[2] >= 0)
    tokens = [t for tile in tiles for t in range(tile[1], tile[1] + tile[3])]
    assert sorted(tokens) == list(range(len(decodes), sum(n for n, _ in requests) + padding))


def test_tiles_with_most_keys_come_first() -> None:
    _, _, tiles = _planned([(100, 120)], TritonAttentionOptions())
    positions = [tile[2] for tile in tiles]
    assert positions == sorted(positions, reverse=True) and positions[-1] == 20


def test_a_long_request_gets_more_units_than_short_ones() -> None:
    backend, units, _ = _planned([(1, 1600), *[(1, 16)] * 8], TritonAttentionOptions())
    counts = [sum(unit[0] == i for unit in units) for i in range(9)]
    assert counts[0] > 8 and set(counts[1:]) == {1}
    assert len(units) <= backend.sizes.max_units(9)


@pytest.mark.parametrize("lens", [[300, 310, 290, 305], [900, 20, 20, 700], [33, 1, 1, 1], [500] * 16, [400, 30] * 8])
def test_few_requests_keep_to_the_budget(lens: list[int]) -> None:
    """Then all programs run at once."""
    backend, units, _ = _planned([(1, m) for m in lens], TritonAttentionOptions())
    budget = backend.sizes.decodes[0].budget
    assert len(units) <= budget == backend.sizes.max_units(len(lens))


def test_parts_hold_the_least_number_of_keys() -> None:
    _, units, _ = _planned([(1, 64)], TritonAttentionOptions(min_keys=48))
    assert [unit[3] - unit[2] for unit in units] == [32, 32]


@pytest.mark.parametrize(("num_tiles", "in_a_unit"), [(8, 1), (19, 2), (33, 3)])
def test_the_longer_a_request_the_larger_its_units(num_tiles: int, in_a_unit: int) -> None:
    """Merging them grows with their number: of n tiles a unit has sqrt(n / 8) at least."""
    backend, units, _ = _planned([(1, 16 * num_tiles)], TritonAttentionOptions())
    assert backend.sizes.decodes[0].budget > num_tiles
    assert {unit[3] - unit[2] for unit in units[:-1]} == {16 * in_a_unit}
