"""Blocks: references, hashes, and the order in which free ones are taken."""

import pytest
from octavo.engine.block_pool import NULL_BLOCK, BlockKey, BlockPool


def key(name: str, group: int = 0) -> BlockKey:
    return BlockKey(group, name.encode())


def take_all(pool: BlockPool) -> list[int]:
    return [pool.take() for _ in range(pool.num_free)]


def test_a_new_pool_gives_every_block_but_the_null_block() -> None:
    pool = BlockPool(4)
    assert (pool.num_blocks, pool.num_free, pool.num_used) == (4, 3, 0)
    assert take_all(pool) == [1, 2, 3]
    assert (pool.num_free, pool.num_used) == (0, 3)
    assert [pool.refs(block) for block in range(4)] == [0, 1, 1, 1]
    pool.check({1: 1, 2: 1, 3: 1})


def test_an_empty_pool_has_nothing_to_take() -> None:
    pool = BlockPool(2)
    pool.take()
    with pytest.raises(AssertionError, match=r"^take\(\) from an empty pool$"):
        pool.take()


def test_blocks_without_a_hash_are_taken_first_and_then_the_least_recently_freed() -> None:
    pool = BlockPool(7)
    for block in take_all(pool):
        if block % 2:
            assert pool.publish(block, key(str(block)))
    for block in (5, 2, 1, 6, 3, 4):
        pool.release(block)
        pool.check({b: 1 for b in range(1, 7) if pool.refs(b)})
    assert take_all(pool) == [4, 6, 2, 5, 1, 3]


def test_taking_a_block_forgets_its_hash() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.publish(block, key("a"))
    pool.release(block)
    assert pool.find(key("a")) == block
    assert pool.take() == block
    assert pool.find(key("a")) is None
    pool.check({block: 1})


def test_a_free_block_that_is_held_again_keeps_its_hash_and_leaves_the_list() -> None:
    pool = BlockPool(3)
    first = pool.take()
    pool.publish(first, key("a"))
    pool.release(first)
    pool.hold(first)
    assert (pool.refs(first), pool.num_free, pool.find(key("a"))) == (1, 1, first)
    pool.hold(first)
    assert (pool.refs(first), pool.num_free) == (2, 1)
    pool.check({first: 2})
    pool.release(first)
    assert (pool.refs(first), pool.num_free) == (1, 1)
    pool.release(first)
    assert (pool.refs(first), pool.num_free) == (0, 2)
    pool.check({})


def test_using_a_cached_block_makes_it_the_last_to_be_taken() -> None:
    pool = BlockPool(4)
    for block in take_all(pool):
        pool.publish(block, key(str(block)))
    for block in (1, 2, 3):
        pool.release(block)
    pool.hold(1)
    pool.release(1)
    assert take_all(pool) == [2, 3, 1]


def test_releasing_more_often_than_holding_is_a_bug() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match=r"^block 1 released more often than held$"):
        pool.release(1)


def test_one_key_names_one_block_and_one_block_has_one_key() -> None:
    pool = BlockPool(3)
    first, second = take_all(pool)
    assert pool.publish(first, key("a")) is True
    assert pool.publish(second, key("a")) is False
    assert pool.publish(first, key("b")) is False
    assert (pool.find(key("a")), pool.find(key("b"))) == (first, None)
    assert pool.publish(second, key("a", group=1)) is True
    assert pool.find(key("a", group=1)) == second
    pool.check({first: 1, second: 1})


def test_withdrawing_frees_the_key_for_another_block() -> None:
    pool = BlockPool(3)
    first, second = take_all(pool)
    pool.publish(first, key("a"))
    pool.withdraw(first)
    pool.withdraw(first)
    assert pool.find(key("a")) is None
    assert (pool.refs(first), pool.num_free) == (1, 0)
    assert pool.publish(second, key("a"))
    assert pool.publish(first, key("b"))
    assert (pool.find(key("a")), pool.find(key("b"))) == (second, first)


def test_a_free_block_that_loses_its_hash_is_taken_first() -> None:
    pool = BlockPool(4)
    for block in take_all(pool):
        pool.publish(block, key(str(block)))
    for block in (1, 2, 3):
        pool.release(block)
    pool.withdraw(3)
    pool.check({})
    assert take_all(pool) == [3, 1, 2]


def test_withdraw_all_forgets_held_and_free_blocks() -> None:
    pool = BlockPool(4)
    for block in take_all(pool):
        pool.publish(block, key(str(block)))
    pool.release(2)
    pool.withdraw_all()
    assert [pool.find(key(str(block))) for block in (1, 2, 3)] == [None] * 3
    assert [pool.refs(block) for block in (1, 2, 3)] == [1, 0, 1]
    pool.check({1: 1, 3: 1})


def damaged(damage: str) -> BlockPool:
    """A pool of blocks 1 (held), 2 (free, published), 3 and 4 (free), with one thing wrong."""
    pool = BlockPool(5)
    take_all(pool)
    pool.publish(2, key("a"))
    for block in (2, 3, 4):
        pool.release(block)
    match damage:
        case "count":
            pool.num_free += 1
        case "held":
            pool._unlink(3)
            pool._link(1, at_head=True)
        case "lost":
            pool._unlink(3)
        case "hash":
            pool._by_key[key("b")] = 3
        case "order":
            pool._unlink(2)
            pool._link(2, at_head=True)
        case "loop":
            pool._next[2] = 4
            pool._prev[4] = 2
        case "torn":
            pool._prev[3] = 2
    return pool


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("count", r"^3 blocks in the free list, 4 counted$"),
        ("held", r"^a held block is in the free list$"),
        ("lost", r"^a block is lost$"),
        ("hash", r"^hashes and blocks disagree$"),
        ("order", r"^a block with a hash would be taken before one without$"),
        ("loop", r"^the free list has a loop$"),
        ("torn", r"^the free list is torn$"),
    ],
)
def test_check_finds_what_is_wrong(damage: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        damaged(damage).check({1: 1})


def test_check_compares_references_with_holders() -> None:
    pool = damaged("")
    pool.check({1: 1})
    with pytest.raises(AssertionError, match=r"^block 1 has 1 references, its holders are 2$"):
        pool.check({1: 2})
    with pytest.raises(AssertionError, match=r"^block 1 has 1 references, its holders are 0$"):
        pool.check({})
    with pytest.raises(AssertionError, match=r"^block 4 has 0 references, its holders are 1$"):
        pool.check({1: 1, 4: 1})
    with pytest.raises(AssertionError, match=r"^the null block is held$"):
        pool.check({1: 1, NULL_BLOCK: 1})
