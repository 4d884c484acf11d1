"""Who holds which block: tables of each request and KV group, prefix hits, copy-on-write, windows.

PagedAttention (Kwon et al. 2023, §4.2-4.4): a table maps a request's logical blocks to the pool's; forks share blocks
and the first writer copies. All groups draw from one pool.
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from octavo.engine.block_pool import NULL_BLOCK, BlockKey, BlockPool


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share format, window and heads; `window` None sees everything."""

    window: int | None = None


@dataclass(slots=True)
class TableEdit:
    """A table's new entry: `block` at `index` of group `group`; `copied_from` is the shared block that it replaces."""

    group: int
    index: int
    block: int
    copied_from: int | None = None


@dataclass(slots=True)
class _Tables:
    blocks: list[list[int]]
    num_tokens: int = 0
    num_trimmed: list[int] = field(default_factory=list)


def chain_hash(parent: bytes, token_ids: Sequence[int], salt: str = "") -> bytes:
    """The hash of a block: sha256 over the parent block's hash, the salt (first block only) and the token ids."""
    digest = sha256(parent)
    if not parent:
        digest.update(f"{len(salt)}:{salt}:".encode())
    digest.update(array("I", token_ids))
    return digest.digest()


class BlockManager:
    """The blocks of all requests. A request is named by an int key of the caller's choice.

    Tokens counted as held may still be on their way: what a submitted step will write counts as written, since blocks
    that are freed are reused by later-submitted steps only.
    """

    def __init__(
        self, num_blocks: int, block_size: int, groups: Sequence[KVGroup] = (KVGroup(),), *, prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self.groups = tuple(groups)
        self.prefix_caching = prefix_caching
        self._has_windows = any(group.window is not None for group in self.groups)
        self.pool = BlockPool(num_blocks)
        self.num_copies = 0
        self._tables: dict[int, _Tables] = {}
        self._published: dict[int, list[tuple[int, BlockKey]]] = {}

    # -- prefix hits ------------------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of `hashes` every group can serve."""
        if not self.prefix_caching:
            return 0
        count = len(hashes)
        while count:
            fits = min(self._match_group(g, hashes[:count]) for g in range(len(self.groups)))
            if fits == count:
                break
            count = fits
        return count

    def _match_group(self, group: int, hashes: Sequence[bytes]) -> int:
        """The largest hit of at most len(hashes) blocks that this group alone can serve."""
        found = [self.pool.find(BlockKey(group, h)) is not None for h in hashes]
        if self.groups[group].window is None:
            return found.index(False) if False in found else len(found)
        for count in range(len(found), 0, -1):
            if all(found[self._first_seen(group, count * self.block_size) : count]):
                return count
        return 0

    def _first_seen(self, group: int, position: int) -> int:
        """The first block that a query at `position` sees: key j is seen iff position - window < j."""
        window = self.groups[group].window
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def admit(self, key: int, hashes: Sequence[bytes] = ()) -> int:
        """Give `key` tables that begin with the blocks of `hashes` (as many as `match` said); the tokens they hold."""
        assert key not in self._tables, f"request {key} has tables already"
        position = len(hashes) * self.block_size
        tables = _Tables([], position)
        for group in range(len(self.groups)):
            first = self._first_seen(group, position)
            blocks = [NULL_BLOCK] * first
            for h in hashes[first:]:
                block = self.pool.find(BlockKey(group, h))
                assert block is not None, "admit() of a block that is not cached"
                self.pool.hold(block)
                blocks.append(block)
            tables.blocks.append(blocks)
            tables.num_trimmed.append(first)
        self._tables[key] = tables
        return position

    # -- growth and copy-on-write -----------------------------------------------------------------------------------

    def grow(self, key: int, end: int) -> list[TableEdit] | None:
        """Make room to write tokens up to `end`, copying shared blocks that would be written.

        Returns the edits of the tables, or None, with nothing changed, when blocks are lacking.
        """
        tables = self._tables[key]
        num_blocks = -(-end // self.block_size)
        plans = [self._plan(table, tables.num_tokens, num_blocks) for table in tables.blocks]
        if sum(len(plan) for plan in plans) > self.pool.num_free:
            return None
        edits = [self._edit(g, tables.blocks[g], index) for g, plan in enumerate(plans) for index in plan]
        tables.num_tokens = max(tables.num_tokens, end)
        return edits

    def room(self, key: int) -> int:
        """Up to how many tokens `key` may write, one by one, without a change to its tables.

        They have their places in the last block of each table, which is its own, and no window leaves a block behind.
        `advance` says later how many of them were written; until then `grow` and `trim` would have nothing to do.
        """
        tables = self._tables[key]
        end = tables.num_tokens
        if any(not table or self.pool.refs(table[-1]) != 1 for table in tables.blocks):
            return end
        rooms = [len(table) * self.block_size for table in tables.blocks]
        if self._has_windows:
            rooms += map(self._leaves_block, range(len(self.groups)), tables.num_trimmed)
        return max(end, min(rooms))

    def _leaves_block(self, group: int, num_trimmed: int) -> int:
        """The number of tokens from which on no later query sees one block more than `num_trimmed`."""
        window = self.groups[group].window
        return sys.maxsize if window is None else (num_trimmed + 1) * self.block_size + window - 1

    def advance(self, key: int, num_tokens: int) -> None:
        """`key` has written up to `num_tokens` tokens, into places that `room` told of."""
        self._tables[key].num_tokens = num_tokens

    def _plan(self, table: list[int], num_tokens: int, num_blocks: int) -> list[int]:
        """Indices that need a block of their own: shared ones about to be written, then those past the table's end."""
        first = num_tokens // self.block_size
        shared = [i for i in range(first, min(len(table), num_blocks)) if self.pool.refs(table[i]) > 1]
        return shared + list(range(len(table), num_blocks))

    def _edit(self, group: int, table: list[int], index: int) -> TableEdit:
        block = self.pool.take()
        if index == len(table):
            table.append(block)
            return TableEdit(group, index, block)
        source = table[index]
        self.pool.release(source)
        table[index] = block
        self.num_copies += 1
        return TableEdit(group, index, block, copied_from=source)

    def trim(self, key: int) -> list[TableEdit]:
        """Free the blocks that no later query of a window group sees; their entries become the null block."""
        edits: list[TableEdit] = []
        if not self._has_windows:
            return edits
        tables = self._tables[key]
        unseen = self._num_unseen(tables)
        for group, (table, first) in enumerate(zip(tables.blocks, unseen, strict=True)):
            for index in range(tables.num_trimmed[group], first):
                self.pool.release(table[index])
                table[index] = NULL_BLOCK
                edits.append(TableEdit(group, index, NULL_BLOCK))
        tables.num_trimmed = unseen
        return edits

    def _num_unseen(self, tables: _Tables) -> list[int]:
        """The leading blocks of each table that no later query sees."""
        position = tables.num_tokens
        return [min(self._first_seen(group, position), len(table)) for group, table in enumerate(tables.blocks)]

    def fork(self, parent: int, child: int) -> None:
        """Let `child` share every block of `parent`, the partly filled last one too."""
        assert child not in self._tables, f"request {child} has tables already"
        source = self._tables[parent]
        for table in source.blocks:
            for block in table:
                if block != NULL_BLOCK:
                    self.pool.hold(block)
        self._tables[child] = _Tables([list(t) for t in source.blocks], source.num_tokens, list(source.num_trimmed))

    def free(self, key: int) -> None:
        """Give back all blocks of `key`, the last ones first, so that prefixes stay cached longest."""
        for table in self._tables.pop(key).blocks:
            for block in reversed(table):
                if block != NULL_BLOCK:
                    self.pool.release(block)

    def tables(self, key: int) -> list[list[int]]:
        """The block table of each group."""
        return self._tables[key].blocks

    # -- hashes -----------------------------------------------------------------------------------------------------

    def publish(self, key: int, hashes: Sequence[bytes], start: int, step_id: int) -> None:
        """Let blocks `start`, ... of `key` be found, one for each of `hashes`; step `step_id` fills them."""
        if not self.prefix_caching:
            return
        for group, table in enumerate(self._tables[key].blocks):
            for index, h in enumerate(hashes, start):
                block_key = BlockKey(group, h)
                if table[index] != NULL_BLOCK and self.pool.publish(table[index], block_key):
                    self._published.setdefault(step_id, []).append((table[index], block_key))

    def fills(self, step_id: int, hashes: Sequence[bytes]) -> bool:
        """Whether step `step_id` fills some of the blocks that are found by `hashes`."""
        return not {key.hash for _, key in self._published.get(step_id, ())}.isdisjoint(hashes)

    def settle(self, step_id: int) -> None:
        """The step succeeded: what it published stays."""
        self._published.pop(step_id, None)

    def withdraw_since(self, step_id: int) -> None:
        """The step failed: take back what it published, and what later steps did, which may build on it."""
        for step in [s for s in self._published if s >= step_id]:
            for block, block_key in self._published.pop(step):
                if self.pool.find(block_key) == block:
                    self.pool.withdraw(block)

    def reset_prefix_cache(self) -> None:
        """Forget every hash; blocks in use stay in use."""
        self.pool.withdraw_all()
        self._published.clear()

    # -- accounts ---------------------------------------------------------------------------------------------------

    @property
    def num_slots_used(self) -> int:
        """Slots of all blocks that requests hold."""
        return self.pool.num_used * self.block_size

    @property
    def num_slots_wasted(self) -> int:
        """Slots behind the last token of each request, in blocks of its own."""
        wasted = 0
        for tables in self._tables.values():
            for table in tables.blocks:
                spare = len(table) * self.block_size - tables.num_tokens
                if spare and self.pool.refs(table[-1]) == 1:
                    wasted += spare
        return wasted

    def check_idle(self) -> None:
        """Verify that nothing is held, in no time: what `check` comes to without requests. Raises AssertionError."""
        assert not self._tables, f"{len(self._tables)} requests have blocks, but none is there"
        assert self.pool.num_used == 0, f"{self.pool.num_used} blocks are held, but no request is there"

    def check(self) -> None:
        """Verify that no block is lost or shared by mistake. Raises AssertionError."""
        refs: dict[int, int] = {}
        for tables in self._tables.values():
            for group, table in enumerate(tables.blocks):
                assert len(table) * self.block_size >= tables.num_tokens, "tokens without a block"
                assert NULL_BLOCK not in table[tables.num_trimmed[group] :], "a block in sight is missing"
                for block in table:
                    if block != NULL_BLOCK:
                        refs[block] = refs.get(block, 0) + 1
        self.pool.check(refs)
