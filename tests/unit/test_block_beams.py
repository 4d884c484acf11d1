"""Beam search's pattern: beams that fork again and again, sharing blocks and copying those that they write."""

import random

from octavo.engine.block_manager import BlockManager, KVGroup
from octavo.engine.block_pool import NULL_BLOCK

SIZE = 4


class Beams:
    """Beams of one length that really write their tokens into blocks, to be read back through the tables."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.tokens: dict[int, list[int]] = {}
        self.cells: dict[int, list[int]] = {}
        self.last = 0

    def restart(self) -> None:
        """Free all beams and begin again with one of 10 tokens."""
        for key in self.tokens:
            self.blocks.free(key)
        self.last += 1
        self.blocks.admit(self.last)
        self.tokens = {self.last: []}
        for token in range(10):
            self.write(self.last, token)

    def fork(self, parents: list[int]) -> None:
        """The beams become children of `parents`, one each."""
        old = self.tokens
        self.tokens = {}
        for parent in parents:
            self.last += 1
            self.blocks.fork(parent, self.last)
            self.tokens[self.last] = list(old[parent])
        for key in old:
            self.blocks.free(key)

    def write(self, key: int, token: int) -> None:
        """Add a token to a beam."""
        position = len(self.tokens[key])
        self.blocks.trim(key)
        for edit in self.blocks.grow(key, position + 1) or []:
            source = self.cells[edit.copied_from] if edit.copied_from else [-1] * SIZE
            self.cells[edit.block] = list(source)
        for table in self.blocks.tables(key):
            self.cells[table[position // SIZE]][position % SIZE] = token
        self.tokens[key].append(token)

    def check(self) -> None:
        """Every beam finds its own tokens, and the blocks are in order."""
        self.blocks.check()
        for key, tokens in self.tokens.items():
            for table in self.blocks.tables(key):
                for position, token in enumerate(tokens):
                    block = table[position // SIZE]
                    assert block == NULL_BLOCK or self.cells[block][position % SIZE] == token


def test_beams_that_fork_again_at_random_for_1000_steps_keep_their_tokens() -> None:
    chance = random.Random(5)
    beams = Beams(BlockManager(8 * 2 * 12 + 1, SIZE, (KVGroup(), KVGroup(7)), prefix_caching=False))
    beams.restart()
    for _ in range(1000):
        if max(map(len, beams.tokens.values())) == 40:
            beams.restart()
        beams.fork(chance.choices(list(beams.tokens), k=8))
        for key in beams.tokens:
            beams.write(key, chance.getrandbits(20))
        beams.check()
    assert beams.blocks.num_copies > 1000
    for key in beams.tokens:
        beams.blocks.free(key)
    beams.blocks.check()
    assert beams.blocks.pool.num_used == 0
