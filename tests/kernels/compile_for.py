"""Compile the copy kernel for a device that is not there; print what the generated code does with memory, as JSON.

Run as a program of its own, since Triton's interpreter, which the tests use, and its compiler exclude each other.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lmcache_kernels_cuda.blocks import WARPS, copy_blocks, variant, word_bytes

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of a block, and what divides all addresses.
GEOMETRIES = {
    "a token's row, 8 heads of 128, bf16": (2048, 16),
    "a head of it": (256, 16),
    "MLA, 576 of bf16": (1152, 16),
    "MLA, 656 bytes of fp8": (656, 16),
    "aligned to words of 8": (2048, 8),
    "aligned to nothing": (2048, 1),
}
WORDS = {8: "*i64", 4: "*i32", 2: "*i16", 1: "*u8"}
# As a launch would: torch's memory is at a multiple of 16, tables and counts are anything.
ALIGNED = ("staging",)
NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
# NVIDIA: global and local (a spill). AMD: any of the ways to reach memory; scratch is a spill.
ACCESS = r"\b(?:LD|ST)[GL]\.[\w.]+|(?:global|buffer|flat|scratch)_(?:load|store)\w*"
SPILL = r"\b(?:LDL|STL)\b|scratch_(?:load|store)"
SPILLED = r"(?:spill_count|ScratchSize): *([1-9]\d*)"


def machine_code(built: Any) -> str:
    """What the device would run."""
    if "amdgcn" in built.asm:
        return str(built.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return subprocess.run([NVDISASM, file.name], check=True, capture_output=True, text=True).stdout


def compile_for(target: GPUTarget, block: int, alignment: int, to_staging: bool) -> dict[str, Any]:
    constants = {**variant(block, alignment), "TO_STAGING": to_staging}
    types = {"bases": "*i64", "offsets": "*i64", "blocks": "i32", "planes": "i32"}
    types["staging"] = WORDS[word_bytes(alignment)]
    signature = {name: types.get(name, "constexpr") for name in copy_blocks.arg_names}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(copy_blocks.arg_names) if name in ALIGNED}
    source = ASTSource(copy_blocks, signature, constants, hints)
    code = machine_code(triton.compile(source, target=target, options={"num_warps": WARPS}))
    return {
        "accesses": collections.Counter(re.findall(ACCESS, code)),
        "spills": len(re.findall(SPILL, code)) + len(re.findall(SPILLED, code)),
    }


def main(name: str) -> None:
    print(
        json.dumps(
            {
                f"{geometry}; {'gather' if to_staging else 'scatter'}": compile_for(
                    TARGETS[name], block, alignment, to_staging
                )
                for geometry, (block, alignment) in GEOMETRIES.items()
                for to_staging in (True, False)
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
