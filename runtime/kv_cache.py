"""Which blocks of the paged KV cache belong to whom: bookkeeping only, the memory is the engines'.

Block 0 is the null block that padding writes to; it is never handed out. Sharing of blocks (prefix caching) fits
here later: the scheduler knows only `allocate` and `release`.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """A free list over blocks 1 .. num_blocks - 1. Last released, first reused: they are still warm."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """num_blocks counts the null block; block_size is in tokens."""
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"a KV cache of {num_blocks} blocks of {block_size} tokens holds nothing")
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, 0, -1))
        self._used: set[int] = set()

    @property
    def total(self) -> int:
        """Blocks that sequences can own."""
        return len(self._free) + len(self._used)

    @property
    def free(self) -> int:
        """Blocks that no sequence owns."""
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for one owner, or None (and nothing taken) when fewer are free."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._used.update(blocks)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: a block that nobody owns, or one twice; nothing is released then. It means two sequences have
                shared memory, so it must not pass silently.
        """
        blocks = list(blocks)
        if len(set(blocks)) != len(blocks) or not self._used.issuperset(blocks):
            raise ValueError(f"blocks {blocks} are not all owned once")
        self._used.difference_update(blocks)
        self._free.extend(reversed(blocks))
