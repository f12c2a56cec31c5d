"""The Triton kernel: blocks of engine memory <-> a staging buffer on the device, for every layout and both ways.

A block is what is contiguous both in engine memory and in the chunk: a token's row, or one head of it. Where the blocks
are says a table of offsets, the same for all planes of one geometry; where the planes are, a table of addresses.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}

# Enough to fill a part of the memory's bandwidth that no bus outruns, few enough to leave the forward pass its cores.
PROGRAMS = 32
TILE_WORDS = 1024
WARPS = 4
WIDE_BYTES = 16  # of the widest access


# Compiled for a geometry, and not again for counts and tables that happen to be multiples of 16.
@triton.jit(do_not_specialize=["blocks", "planes"], do_not_specialize_on_alignment=["bases", "offsets"])
def copy_blocks(  # type: ignore[no-untyped-def]
    bases,
    offsets,
    staging,
    blocks,
    planes,
    WORDS: tl.constexpr,  # of a block
    BLOCKS_A_TILE: tl.constexpr,
    WORDS_A_TILE: tl.constexpr,
    ALIGNED: tl.constexpr,  # words that all addresses are a multiple of
    TO_STAGING: tl.constexpr,
):
    """Few programs, each for tile after tile; ``staging`` is [planes, blocks, WORDS], offsets are in words."""
    kind = tl.pointer_type(staging.dtype.element_ty)
    tiles = tl.cdiv(blocks, BLOCKS_A_TILE)
    word = tl.arange(0, WORDS_A_TILE)
    for job in range(tl.program_id(0), tiles * planes, tl.num_programs(0)):
        plane = job // tiles
        block = (job % tiles) * BLOCKS_A_TILE + tl.arange(0, BLOCKS_A_TILE)
        inside = block < blocks
        # An address that comes out of a table is of unknown alignment: without being told, Triton copies in pieces of
        # an element.
        base = tl.multiple_of(tl.load(bases + plane).to(kind), ALIGNED * (kind.element_ty.primitive_bitwidth // 8))
        offset = tl.multiple_of(tl.load(offsets + block, mask=inside, other=0), ALIGNED)
        place = tl.multiple_of((plane.to(tl.int64) * blocks + block) * WORDS, ALIGNED)
        for first in range(0, WORDS, WORDS_A_TILE):
            at = first + word
            mask = inside[:, None] & (at < WORDS)[None, :]
            memory = base + offset[:, None] + at[None, :]
            staged = staging + place[:, None] + at[None, :]
            if TO_STAGING:
                tl.store(staged, tl.load(memory, mask=mask), mask=mask)
            else:
                tl.store(memory, tl.load(staged, mask=mask), mask=mask)


def word_bytes(alignment: int) -> int:
    """The largest word for memory of which everything is a multiple of ``alignment`` bytes."""
    return next(size for size in WORDS if alignment % size == 0)


def launch(
    bases: torch.Tensor,
    offsets: torch.Tensor,
    staging: torch.Tensor,
    block: int,
    alignment: int,
    *,
    to_staging: bool,
    tile_words: int = TILE_WORDS,
    programs: int = PROGRAMS,
) -> None:
    """Queue a copy on the current stream.

    Args:
        bases: int64 [planes], addresses.
        offsets: int64 [blocks], in words of ``word_bytes(alignment)``.
        staging: uint8 [planes * blocks * block], at a multiple of 16.
        block: bytes.
        alignment: bytes that divide the bases, offsets and ``block``.
        tile_words, programs: how the work is cut; any numbers are right.
    """
    size = word_bytes(alignment)
    copy_blocks[(programs,)](
        bases, offsets, staging.view(WORDS[size]), len(offsets), len(bases), **variant(block, alignment, tile_words),
        TO_STAGING=to_staging, num_warps=WARPS,
    )  # fmt: skip


def variant(block: int, alignment: int, tile_words: int = TILE_WORDS) -> dict[str, Any]:
    """What the kernel is compiled for: one variant for a geometry, whatever the slots are."""
    size = word_bytes(alignment)
    words = block // size
    wide = min(triton.next_power_of_2(words), tile_words)
    return {
        "WORDS": words,
        "BLOCKS_A_TILE": tile_words // wide,
        "WORDS_A_TILE": wide,
        "ALIGNED": gcd(alignment, WIDE_BYTES) // size,
    }
