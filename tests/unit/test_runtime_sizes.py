"""The numbers of tokens that products are computed for."""

import pytest
from octavo.runtime.sizes import all_sizes, roomy


@pytest.mark.parametrize("most", [1, 7, 100, 512, 600, 2000, 8192, 50_000])
def test_every_number_has_room_and_little_is_wasted(most: int) -> None:
    for number in range(1, most + 1):
        room = roomy(number, most)
        assert number <= room <= min(most, max(2 * number - 1, 1)) and room - number <= max(7, number // 4)
    assert roomy(0, most) == 0


def test_sizes_are_few() -> None:
    assert all_sizes(8192)[:7] == [1, 2, 4, 8, 16, 24, 32]
    assert len(all_sizes(8192)) < 130 and len(all_sizes(131_072)) < 400
    assert sum(all_sizes(131_072)) < 100 * 131_072, "the start's time"
    assert all_sizes(600)[-2:] == [512, 600]
