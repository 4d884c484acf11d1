"""Tables of requests: growth, prefix hits, copy-on-write, published hashes and the accounts."""

from hashlib import sha256

import pytest
from block_helpers import FULL, SIZE, filled, hashes_of, manager
from octavo.engine.block_manager import BlockManager, KVGroup, TableEdit, chain_hash
from octavo.engine.block_pool import NULL_BLOCK, BlockKey

# -- hashes ----------------------------------------------------------------------------------------------


def test_hashes_depend_on_tokens_parent_and_salt() -> None:
    plain = chain_hash(b"", [1, 2, 3])
    assert plain == chain_hash(b"", (1, 2, 3)) == chain_hash(b"", [1, 2, 3], "")
    others = [chain_hash(b"", [1, 3, 2]), chain_hash(plain, [1, 2, 3]), chain_hash(b"", [1, 2, 3], "salt")]
    assert len({plain, *others}) == 4
    assert len(plain) == sha256().digest_size


def test_the_salt_is_in_the_first_block_and_so_in_all() -> None:
    parent = chain_hash(b"", [1])
    assert chain_hash(parent, [2], "a") == chain_hash(parent, [2], "b")
    assert hashes_of([1] * 8, "a")[1] != hashes_of([1] * 8, "b")[1]


def test_salts_cannot_be_confused_with_tokens_or_with_each_other() -> None:
    assert chain_hash(b"", [], "1:a") != chain_hash(b"", [], "a")
    as_token = int.from_bytes(b"salt", "little")
    assert chain_hash(b"", [as_token]) != chain_hash(b"", [], "salt")


# -- growth ----------------------------------------------------------------------------------------------


def test_tables_grow_by_whole_blocks() -> None:
    blocks = manager()
    assert blocks.admit(1) == 0
    assert blocks.grow(1, 5) == [TableEdit(0, 0, 1), TableEdit(0, 1, 2)]
    assert blocks.grow(1, 8) == []
    assert blocks.grow(1, 9) == [TableEdit(0, 2, 3)]
    assert blocks.tables(1) == [[1, 2, 3]]
    blocks.check()


def test_there_is_room_to_the_end_of_the_last_block() -> None:
    blocks = manager()
    blocks.admit(1)
    assert blocks.room(1) == 0, "there is no block yet"
    blocks.grow(1, 6)
    assert blocks.room(1) == 8
    blocks.advance(1, 8)
    assert blocks.room(1) == 8
    assert blocks.num_slots_wasted == 0
    assert blocks.grow(1, 9) == [TableEdit(0, 2, 3)]
    assert blocks.room(1) == 12
    assert blocks.num_slots_wasted == 3
    blocks.check()


def test_there_is_no_room_in_a_block_that_others_hold() -> None:
    blocks = manager()
    blocks.admit(1)
    blocks.grow(1, 6)
    blocks.fork(1, 2)
    assert (blocks.room(1), blocks.room(2)) == (6, 6)
    blocks.free(2)
    assert blocks.room(1) == 8


def test_every_group_has_a_table_of_its_own() -> None:
    blocks = manager(20, FULL, KVGroup(100))
    blocks.admit(1)
    assert blocks.grow(1, 8) == [TableEdit(0, 0, 1), TableEdit(0, 1, 2), TableEdit(1, 0, 3), TableEdit(1, 1, 4)]
    assert blocks.tables(1) == [[1, 2], [3, 4]]
    blocks.check()


def test_growth_that_does_not_fit_changes_nothing() -> None:
    blocks = manager(6, FULL, FULL)
    blocks.admit(1)
    assert blocks.grow(1, 4) is not None
    assert blocks.grow(1, 12) is None
    assert blocks.tables(1) == [[1], [2]]
    assert blocks.pool.num_free == 3
    blocks.check()
    assert blocks.grow(1, 8) is not None
    assert blocks.pool.num_free == 1


def test_growth_takes_the_last_free_block() -> None:
    blocks = manager(4)
    blocks.admit(1)
    assert blocks.grow(1, 12) is not None
    assert blocks.pool.num_free == 0
    assert blocks.grow(1, 13) is None


def test_a_request_has_tables_once() -> None:
    blocks = manager()
    blocks.admit(1)
    blocks.admit(2)
    with pytest.raises(AssertionError, match=r"^request 1 has tables already$"):
        blocks.admit(1)
    with pytest.raises(AssertionError, match=r"^request 2 has tables already$"):
        blocks.fork(1, 2)
    blocks.free(1)
    with pytest.raises(KeyError):
        blocks.tables(1)
    assert blocks.admit(1) == 0


def test_freeing_gives_the_last_blocks_back_first() -> None:
    blocks = manager(6)
    hashes = filled(blocks, 1, range(20))
    blocks.free(1)
    assert blocks.pool.num_used == 0
    blocks.admit(2)
    blocks.grow(2, 8)
    assert blocks.match(hashes) == 3  # the blocks that were taken were the prompt's last


# -- prefix hits -----------------------------------------------------------------------------------------


def test_a_known_prefix_is_shared() -> None:
    blocks = manager()
    hashes = filled(blocks, 1, range(12))
    assert blocks.match(hashes) == 3
    assert blocks.match(hashes[:2]) == 2
    assert blocks.match([]) == 0
    assert blocks.admit(2, hashes[:2]) == 8
    assert blocks.tables(2) == [blocks.tables(1)[0][:2]]
    assert [blocks.pool.refs(block) for block in blocks.tables(1)[0]] == [2, 2, 1]
    blocks.check()
    blocks.free(1)
    blocks.check()
    assert blocks.match(hashes) == 3


def test_a_hit_ends_where_the_prefix_differs() -> None:
    blocks = manager()
    filled(blocks, 1, range(12))
    assert blocks.match(hashes_of([*range(8), 99, 99, 99, 99])) == 2
    assert blocks.match(hashes_of([99, *range(1, 12)])) == 0
    assert blocks.match(hashes_of(range(12), "salt")) == 0


def test_what_follows_a_gap_is_no_hit() -> None:
    blocks = manager()
    hashes = filled(blocks, 1, range(12))
    blocks.pool.withdraw(blocks.tables(1)[0][1])
    assert blocks.match(hashes) == 1


def test_prefix_caching_is_on_unless_it_is_turned_off() -> None:
    blocks = BlockManager(4, SIZE)
    assert blocks.groups == (FULL,)
    assert blocks.match(filled(blocks, 1, range(8))) == 2


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = manager(prefix_caching=False)
    hashes = filled(blocks, 1, range(12))
    assert blocks.match(hashes) == 0
    assert blocks.pool.find(BlockKey(0, hashes[0])) is None


def test_admitting_an_uncached_block_is_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"^admit\(\) of a block that is not cached$"):
        manager().admit(1, hashes_of(range(4)))


def test_every_group_must_have_the_prefix() -> None:
    blocks = manager(20, FULL, FULL)
    hashes = filled(blocks, 1, range(16))
    blocks.pool.withdraw(blocks.tables(1)[1][2])
    assert blocks.match(hashes) == 2
    assert blocks.admit(2, hashes[:2]) == 8
    assert blocks.tables(2) == [table[:2] for table in blocks.tables(1)]
    blocks.check()


# -- copy-on-write ---------------------------------------------------------------------------------------


def test_forks_share_all_blocks_and_the_first_writers_copy_the_last() -> None:
    blocks = BlockManager(100, 16, prefix_caching=False)
    blocks.admit(0)
    assert blocks.grow(0, 505) is not None
    for child in range(1, 8):
        blocks.fork(0, child)
    blocks.check()
    assert blocks.pool.num_used == 32
    edits = [blocks.grow(key, 506) for key in range(8)]
    blocks.check()
    assert blocks.num_copies == 7
    assert blocks.pool.num_used == 31 + 8
    last = blocks.tables(7)[0][-1]
    assert [len(edit or []) for edit in edits] == [1] * 7 + [0]  # the last writer has the block for itself
    assert all(edit == [TableEdit(0, 31, edit[0].block, copied_from=last)] for edit in edits if edit)
    assert len({blocks.tables(key)[0][-1] for key in range(8)}) == 8
    assert len({tuple(blocks.tables(key)[0][:-1]) for key in range(8)}) == 1
    for key in range(8):
        blocks.free(key)
    assert blocks.pool.num_used == 0
    blocks.check()


def test_a_full_last_block_is_not_copied() -> None:
    blocks = manager()
    blocks.admit(0)
    blocks.grow(0, 8)
    blocks.fork(0, 1)
    assert blocks.grow(1, 9) == [TableEdit(0, 2, 3)]
    assert blocks.num_copies == 0
    assert blocks.tables(0) == [[1, 2]]
    blocks.check()


def test_blocks_before_the_written_one_stay_shared() -> None:
    blocks = manager()
    blocks.admit(0)
    blocks.grow(0, 7)
    blocks.fork(0, 1)
    assert blocks.grow(1, 13) == [TableEdit(0, 1, 3, copied_from=2), TableEdit(0, 2, 4), TableEdit(0, 3, 5)]
    assert blocks.tables(1) == [[1, 3, 4, 5]]
    assert [blocks.pool.refs(block) for block in (1, 2, 3)] == [2, 1, 1]
    blocks.check()


def test_each_group_copies_its_own_block() -> None:
    blocks = manager(20, FULL, KVGroup(8))
    blocks.admit(0)
    blocks.grow(0, 6)
    blocks.fork(0, 1)
    edits = blocks.grow(1, 7)
    assert edits is not None
    assert [(edit.group, edit.index, edit.copied_from) for edit in edits] == [(0, 1, 2), (1, 1, 4)]
    assert blocks.num_copies == 2
    blocks.check()


def test_a_copy_needs_a_free_block() -> None:
    blocks = manager(3)
    blocks.admit(0)
    blocks.grow(0, 7)
    blocks.fork(0, 1)
    assert blocks.grow(1, 8) is None
    assert blocks.tables(1) == blocks.tables(0)
    blocks.free(0)
    assert blocks.grow(1, 8) == []
    blocks.check()


# -- published hashes ------------------------------------------------------------------------------------


def test_two_requests_with_one_prompt_publish_it_once() -> None:
    blocks = manager()
    hashes = filled(blocks, 1, range(8), step=0)
    filled(blocks, 2, range(8), step=1)
    assert blocks.pool.find(BlockKey(0, hashes[0])) == blocks.tables(1)[0][0]
    blocks.withdraw_since(1)
    assert blocks.match(hashes) == 2
    blocks.withdraw_since(0)
    assert blocks.match(hashes) == 0
    blocks.check()


def test_publishing_may_begin_behind_the_first_block() -> None:
    blocks = manager()
    hashes = filled(blocks, 1, range(8))
    blocks.grow(1, 12)
    more = hashes_of(range(12))
    blocks.publish(1, more[2:], 2, 1)
    assert more[:2] == hashes
    assert [blocks.pool.find(BlockKey(0, h)) for h in more] == blocks.tables(1)[0]


def test_a_failed_step_takes_back_what_it_and_later_steps_published() -> None:
    blocks = manager()
    first = filled(blocks, 1, [1] * 4, step=3)
    second = filled(blocks, 2, [2] * 4, step=4)
    third = filled(blocks, 3, [3] * 4, step=5)
    blocks.withdraw_since(4)
    assert [blocks.match(h) for h in (first, second, third)] == [1, 0, 0]
    blocks.withdraw_since(0)
    assert blocks.match(first) == 0
    blocks.check()


def test_a_settled_step_keeps_its_hashes() -> None:
    blocks = manager()
    hashes = filled(blocks, 1, range(8), step=3)
    blocks.settle(3)
    blocks.settle(3)
    blocks.withdraw_since(0)
    assert blocks.match(hashes) == 2


def test_withdrawing_leaves_a_block_alone_that_has_another_hash_by_now() -> None:
    blocks = manager(2)
    old = filled(blocks, 1, range(4), step=0)
    blocks.free(1)
    new = filled(blocks, 2, [9] * 4, step=1)
    blocks.settle(1)
    blocks.withdraw_since(0)
    assert (blocks.match(old), blocks.match(new)) == (0, 1)


def test_resetting_forgets_all_prefixes_and_keeps_blocks_in_use() -> None:
    blocks = manager()
    hashes = filled(blocks, 1, range(8))
    other = filled(blocks, 2, [5] * 4)
    blocks.free(2)
    blocks.reset_prefix_cache()
    assert (blocks.match(hashes), blocks.match(other)) == (0, 0)
    assert blocks.pool.num_used == 2
    blocks.publish(1, hashes, 0, 7)
    blocks.withdraw_since(7)
    assert blocks.match(hashes) == 0
    blocks.check()


# -- accounts and check ----------------------------------------------------------------------------------


def test_waste_is_what_lies_behind_the_last_token() -> None:
    blocks = manager()
    assert (blocks.num_slots_used, blocks.num_slots_wasted) == (0, 0)
    blocks.admit(1)
    blocks.grow(1, 5)
    assert (blocks.num_slots_used, blocks.num_slots_wasted) == (8, 3)
    blocks.admit(2)
    blocks.grow(2, 4)
    assert (blocks.num_slots_used, blocks.num_slots_wasted) == (12, 3)
    blocks.admit(3)
    blocks.grow(3, 2)
    assert (blocks.num_slots_used, blocks.num_slots_wasted) == (16, 5)
    blocks.fork(1, 4)
    assert (blocks.num_slots_used, blocks.num_slots_wasted) == (16, 2), "a shared last block is put to use"


def test_check_finds_tokens_without_a_block() -> None:
    blocks = manager()
    blocks.admit(1)
    blocks.grow(1, 4)
    blocks._tables[1].num_tokens = 5
    with pytest.raises(AssertionError, match=r"^tokens without a block$"):
        blocks.check()


def test_check_finds_a_block_that_is_missing_in_sight() -> None:
    blocks = manager()
    blocks.admit(1)
    blocks.grow(1, 8)
    blocks.pool.release(blocks.tables(1)[0][1])
    blocks.tables(1)[0][1] = NULL_BLOCK
    with pytest.raises(AssertionError, match=r"^a block in sight is missing$"):
        blocks.check()


def test_check_finds_a_block_shared_by_mistake() -> None:
    blocks = manager()
    blocks.admit(1)
    blocks.grow(1, 4)
    blocks.admit(2)
    blocks.grow(2, 4)
    blocks.tables(2)[0][0] = blocks.tables(1)[0][0]
    with pytest.raises(AssertionError, match=r"^block 1 has 1 references, its holders are 2$"):
        blocks.check()


def test_an_idle_manager_holds_nothing() -> None:
    blocks = BlockManager(8, 4)
    blocks.check_idle()
    blocks.admit(1)
    with pytest.raises(AssertionError, match="1 requests have blocks"):
        blocks.check_idle()
    blocks.free(1)
    blocks.check_idle()
    blocks.pool.take()
    with pytest.raises(AssertionError, match="1 blocks are held"):
        blocks.check_idle()
