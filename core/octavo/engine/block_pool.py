"""Blocks of the KV cache: reference counts, hashes, and an intrusive LRU list of the free ones."""

from typing import NamedTuple

NULL_BLOCK = 0


class BlockKey(NamedTuple):
    """What a full block holds: the chained hash of all tokens up to its end, for one KV group. Quick to look up."""

    group: int
    hash: bytes


class BlockPool:
    """`num_blocks` blocks by id. Block 0 is the null block: never handed out, and the sentinel of the free list.

    Free blocks are taken from the head: those without a hash first, then the least recently freed.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._by_key: dict[BlockKey, int] = {}
        self._next = [*range(1, num_blocks), NULL_BLOCK]
        self._prev = [num_blocks - 1, *range(num_blocks - 1)]
        self.num_free = num_blocks - 1

    @property
    def num_used(self) -> int:
        """Blocks that someone holds."""
        return self.num_blocks - 1 - self.num_free

    def refs(self, block: int) -> int:
        """How many tables hold the block."""
        return self._refs[block]

    def find(self, key: BlockKey) -> int | None:
        """The block published under `key`, free or held."""
        return self._by_key.get(key)

    def take(self) -> int:
        """A free block with one reference, its hash forgotten. The caller has made sure that there is one."""
        block: int = self._next[NULL_BLOCK]
        assert block != NULL_BLOCK, "take() from an empty pool"
        self.withdraw(block)
        self._unlink(block)
        self._refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more reference to a block that is held, or free and published."""
        if self._refs[block] == 0:
            self._unlink(block)
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one puts the block on the free list."""
        assert self._refs[block] > 0, f"block {block} released more often than held"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._link(block, at_head=self._keys[block] is None)

    def publish(self, block: int, key: BlockKey) -> bool:
        """Let others find the block by `key`; False if it or another block is published already."""
        if self._keys[block] is not None or key in self._by_key:
            return False
        self._keys[block] = key
        self._by_key[key] = block
        return True

    def withdraw(self, block: int) -> None:
        """Forget the block's hash, if it has one; a free block is then among the first to be taken."""
        key = self._keys[block]
        if key is None:
            return
        del self._by_key[key]
        self._keys[block] = None
        if self._refs[block] == 0:
            self._unlink(block)
            self._link(block, at_head=True)

    def withdraw_all(self) -> None:
        """Forget every hash."""
        for block in list(self._by_key.values()):
            self.withdraw(block)

    def _link(self, block: int, *, at_head: bool) -> None:
        before = NULL_BLOCK if at_head else self._prev[NULL_BLOCK]
        after = self._next[before]
        self._prev[block], self._next[block] = before, after
        self._next[before] = self._prev[after] = block
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.num_free -= 1

    def check(self, expected_refs: dict[int, int]) -> None:
        """Verify every invariant; `expected_refs` counts the holders of each held block. Raises AssertionError."""
        for block in range(1, self.num_blocks):
            found, expected = self._refs[block], expected_refs.get(block, 0)
            assert found == expected, f"block {block} has {found} references, its holders are {expected}"
        assert NULL_BLOCK not in expected_refs, "the null block is held"
        free = self._walk()
        assert len(free) == self.num_free, f"{len(free)} blocks in the free list, {self.num_free} counted"
        assert all(self._refs[block] == 0 for block in free), "a held block is in the free list"
        hashed = [self._keys[block] is not None for block in free]
        assert hashed == sorted(hashed), "a block with a hash would be taken before one without"
        assert len(free) + sum(1 for refs in self._refs if refs) == self.num_blocks - 1, "a block is lost"
        published = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert published == self._by_key, "hashes and blocks disagree"

    def _walk(self) -> list[int]:
        blocks: list[int] = []
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            assert len(blocks) < self.num_blocks, "the free list has a loop"
            assert self._next[self._prev[block]] == block, "the free list is torn"
            blocks.append(block)
            block = self._next[block]
        return blocks
