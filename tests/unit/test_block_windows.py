"""Window groups: blocks behind the window are freed, and a prefix hit needs only what the window shows."""

import pytest
from block_helpers import FULL, SIZE, filled, hashes_of, manager
from octavo.engine.block_manager import KVGroup, TableEdit
from octavo.engine.block_pool import NULL_BLOCK, BlockKey

WINDOW = KVGroup(6)


@pytest.mark.parametrize(("window", "position", "first"), [(6, 0, 0), (6, 8, 0), (6, 9, 1), (6, 12, 1), (6, 13, 2)])
def test_the_first_block_in_sight_holds_the_first_key_in_the_window(window: int, position: int, first: int) -> None:
    blocks = manager(20, KVGroup(window))
    seen = [j for j in range(position + 1) if position - window < j]
    assert seen[0] // SIZE == first
    blocks.admit(1)
    if position:
        blocks.grow(1, position)
    edits = blocks.trim(1)
    assert [edit.index for edit in edits] == list(range(first))
    assert all(edit.block == NULL_BLOCK and edit.copied_from is None for edit in edits)
    blocks.check()


def test_trimming_frees_once_and_full_groups_never() -> None:
    blocks = manager(20, FULL, WINDOW)
    blocks.admit(1)
    blocks.grow(1, 13)
    used = blocks.pool.num_used
    assert blocks.trim(1) == [TableEdit(1, 0, NULL_BLOCK), TableEdit(1, 1, NULL_BLOCK)]
    assert blocks.pool.num_used == used - 2
    assert blocks.trim(1) == []
    assert NULL_BLOCK not in blocks.tables(1)[0]
    blocks.grow(1, 17)
    assert blocks.trim(1) == [TableEdit(1, 2, NULL_BLOCK)]
    blocks.check()
    blocks.free(1)
    assert blocks.pool.num_used == 0
    blocks.check()


def test_room_ends_where_a_window_leaves_a_block_behind() -> None:
    blocks = manager(20, FULL, WINDOW)
    blocks.admit(1)
    blocks.grow(1, 9)
    assert blocks.room(1) == 9, "a block is to be left behind now"
    assert blocks.trim(1) == [TableEdit(1, 0, NULL_BLOCK)]
    assert blocks.room(1) == 12
    wide = manager(20, KVGroup(7))
    wide.admit(1)
    wide.grow(1, 9)
    assert wide.room(1) == 10, "the eleventh token sees the fifth and later ones, so no longer the first block"
    wide.advance(1, 9)
    assert wide.trim(1) == []
    wide.advance(1, 10)
    assert wide.trim(1) == [TableEdit(0, 0, NULL_BLOCK)]
    blocks.check()


def test_a_window_smaller_than_a_block_keeps_the_block_it_writes_next() -> None:
    blocks = manager(20, KVGroup(1))
    blocks.admit(1)
    blocks.grow(1, 8)
    assert [edit.index for edit in blocks.trim(1)] == [0, 1]
    assert blocks.tables(1) == [[0, 0]]
    assert blocks.grow(1, 9) is not None
    blocks.check()


def test_trimmed_blocks_are_not_shared_by_a_fork() -> None:
    blocks = manager(20, WINDOW)
    blocks.admit(1)
    blocks.grow(1, 13)
    blocks.trim(1)
    blocks.fork(1, 2)
    assert blocks.tables(2)[0][:2] == [NULL_BLOCK, NULL_BLOCK]
    assert blocks.trim(2) == []
    blocks.check()
    blocks.free(1)
    blocks.check()
    blocks.free(2)
    assert blocks.pool.num_used == 0


def test_trimming_a_fork_leaves_the_blocks_of_the_other() -> None:
    blocks = manager(20, WINDOW)
    blocks.admit(1)
    blocks.grow(1, 9)
    blocks.fork(1, 2)
    blocks.trim(2)
    assert NULL_BLOCK not in blocks.tables(1)[0]
    assert blocks.pool.refs(blocks.tables(1)[0][0]) == 1
    blocks.check()


def test_a_hit_needs_only_the_blocks_in_the_window() -> None:
    blocks = manager(20, WINDOW)
    hashes = filled(blocks, 1, range(16))
    table = list(blocks.tables(1)[0])
    blocks.pool.withdraw(table[0])
    blocks.pool.withdraw(table[1])
    # A query at 16 sees keys 11 to 15: blocks 2 and 3; one at 12 sees 7 to 11 and lacks block 1.
    assert blocks.match(hashes) == 4
    assert blocks.match(hashes[:3]) == 0
    assert blocks.admit(2, hashes) == 16
    assert blocks.tables(2) == [[NULL_BLOCK, NULL_BLOCK, *table[2:]]]
    assert blocks.trim(2) == []
    blocks.check()


def test_a_shorter_hit_is_found_where_the_longest_has_a_gap() -> None:
    blocks = manager(20, WINDOW)
    hashes = filled(blocks, 1, range(16))
    blocks.pool.withdraw(blocks.tables(1)[0][3])
    assert blocks.match(hashes) == 3
    blocks.pool.withdraw(blocks.tables(1)[0][2])
    assert blocks.match(hashes) == 2


def test_the_hit_is_the_longest_that_every_group_can_serve() -> None:
    blocks = manager(40, FULL, WINDOW)
    hashes = filled(blocks, 1, range(20))
    full, window = blocks.tables(1)
    blocks.pool.withdraw(full[4])
    assert blocks.match(hashes) == 4
    blocks.pool.withdraw(window[3])
    assert blocks.match(hashes) == 3
    blocks.pool.withdraw(window[1])
    # At 12 tokens the window lacks block 1, at 8 too; block 0 alone serves 4.
    assert blocks.match(hashes) == 1
    assert blocks.admit(2, hashes[:1]) == 4
    blocks.check()


def test_published_blocks_behind_the_window_are_found_until_they_are_taken() -> None:
    blocks = manager(20, WINDOW)
    hashes = filled(blocks, 1, range(16))
    blocks.trim(1)
    assert blocks.match(hashes[:1]) == 1
    assert blocks.admit(2, hashes[:1]) == 4
    blocks.check()


def test_a_block_that_was_trimmed_is_not_published() -> None:
    blocks = manager(20, FULL, WINDOW)
    hashes = hashes_of(range(12))
    blocks.admit(1)
    blocks.grow(1, 13)
    blocks.trim(1)
    blocks.publish(1, hashes, 0, 0)
    assert [blocks.pool.find(BlockKey(1, h)) for h in hashes] == [None, None, blocks.tables(1)[1][2]]
    assert [blocks.pool.find(BlockKey(0, h)) for h in hashes] == blocks.tables(1)[0][:3]
    assert blocks.pool.find(BlockKey(0, hashes[0])) != NULL_BLOCK
    blocks.check()


def test_waste_counts_no_trimmed_block() -> None:
    blocks = manager(20, KVGroup(1))
    blocks.admit(1)
    blocks.grow(1, 7)
    blocks.trim(1)
    assert (blocks.num_slots_used, blocks.num_slots_wasted) == (4, 1)
    blocks.grow(1, 8)
    blocks.trim(1)
    assert (blocks.num_slots_used, blocks.num_slots_wasted) == (0, 0)
