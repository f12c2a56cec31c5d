"""Several chunks in one record: which, under what name, and how who wants one of them finds it.

A *block* is 2^k consecutive chunks of a request whose first position is a multiple of 2^k. Its record is the chunks'
records one behind the other, under the key of the block's last chunk with the block's size at its end. A digest stands
for all tokens before it, so who has a request's digests can name every block that may hold a chunk of it, and needs no
word from the writer. Specified in ``docs/record-format.md``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

#: Chunks in a block: where requests part, all but one of so many are lost. A reader names as many digests at a time.
MOST = 16

_TOGETHER = 4  # blocks that a tier is given at least, to be written side by side

_SIZE = re.compile(r"\.x([1-9][0-9]*)$")


class Block(NamedTuple):
    """``size`` chunks from position ``first`` on, a multiple of it. Positions count chunks."""

    first: int
    size: int

    @property
    def last(self) -> int:
        return self.first + self.size - 1

    @property
    def end(self) -> int:
        return self.first + self.size


def block_key(key: str, size: int) -> str:
    """The key of a block, of its last chunk's. A block of one is the chunk's own record."""
    return key if size == 1 else f"{key}.x{size}"


def split_key(key: str) -> tuple[str, int]:
    """The last chunk's key, and the size."""
    found = _SIZE.search(key)
    return (key, 1) if found is None else (key[: found.start()], int(found[1]))


def most_chunks(pack_bytes: int, record_bytes: int) -> int:
    """The largest size of a block: a power of two, 1 to :data:`MOST`, whose records are ``pack_bytes`` at most."""
    return min(MOST, 1 << max(0, (pack_bytes // record_bytes).bit_length() - 1))


def sizes(most: int) -> Iterator[int]:
    """Of all blocks, the largest first."""
    while most:
        yield most
        most //= 2


def cut(first: int, end: int, most: int) -> Iterator[Block]:
    """The positions ``first .. end - 1`` as the fewest blocks."""
    while first < end:
        size = next(size for size in sizes(most) if first % size == 0 and first + size <= end)
        yield Block(first, size)
        first += size


def holders(position: int, end: int, most: int) -> Iterator[Block]:
    """The blocks that may hold a position, the largest first, for who knows the digests before ``end``."""
    for size in sizes(most):
        block = Block(position - position % size, size)
        if block.end <= end:
            yield block


Has = Callable[[Sequence[Block]], Sequence[bool]]


def find(first: int, count: int, end: int, most: int, has: Has) -> list[Block]:
    """Which block holds each of the positions from ``first`` on that are there, ``count`` at most.

    Args:
        end: the digests before this position are known.
        has: asks a tier which of these blocks are there; called twice at most, and once for a single position.
    """
    wanted = range(first, min(first + count, end))
    known: dict[Block, bool] = {}

    def ask(blocks: Iterator[Block]) -> None:
        new = [block for block in dict.fromkeys(blocks) if block not in known]
        if new:
            known.update(zip(new, has(new), strict=True))

    def holder(position: int) -> Block | None:
        return next((block for block in holders(position, end, most) if known.get(block)), None)

    if len(wanted) > 1:
        ask(next(holders(position, end, most)) for position in wanted)
    lacking = [position for position in wanted if holder(position) is None]
    ask(block for position in lacking for block in holders(position, end, most))
    found = []
    for position in wanted:
        block = holder(position)
        if block is None:
            break
        found.append(block)
    return found


def lacking(first: int, end: int, most: int, has: Has) -> list[Block]:
    """The blocks to be written for these positions, without those at their front that are there already.

    What is there is a prefix, or nearly, so not all blocks that could be are asked for.
    """
    step = 1
    while first < end:
        found = len(find(first, step, end, most, has))
        first += found
        if found < step:
            break
        step *= 4
    return list(cut(first, end, most))


def batches(positions: Sequence[int], size: int, block: int) -> Iterator[slice]:
    """Cut work on chunks into parts of about ``size``, or of some blocks, where a block ends; positions below 0 are
    unknown.
    """
    if block > 1:
        size = max(-(-size // block), _TOGETHER) * block
    at = 0
    while at < len(positions):
        end = at + size
        if end < len(positions) and positions[end] >= 0:
            end -= positions[end] % block
        yield slice(at, end)
        at = end
