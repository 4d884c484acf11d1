"""Block managers with blocks of four tokens, and what a request's first step does to one."""

from collections.abc import Sequence

from octavo.engine.block_manager import BlockManager, KVGroup, chain_hash

SIZE = 4
FULL = KVGroup()


def hashes_of(tokens: Sequence[int], salt: str = "") -> list[bytes]:
    """The chained hashes of the full blocks of `tokens`."""
    hashes: list[bytes] = []
    for start in range(0, len(tokens) // SIZE * SIZE, SIZE):
        hashes.append(chain_hash(hashes[-1] if hashes else b"", tokens[start : start + SIZE], salt))
    return hashes


def manager(num_blocks: int = 20, *groups: KVGroup, prefix_caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, SIZE, groups or (FULL,), prefix_caching=prefix_caching)


def filled(blocks: BlockManager, key: int, tokens: Sequence[int], step: int = 0) -> list[bytes]:
    """Admit a request that computes `tokens` in one step and publishes its full blocks."""
    hashes = hashes_of(tokens)
    blocks.admit(key)
    assert blocks.grow(key, len(tokens)) is not None
    blocks.publish(key, hashes, 0, step)
    return hashes
