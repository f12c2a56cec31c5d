"""``make bench``: all rows that need no engine, server or device, or those of an engine, of backends, of a device."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import msgspec

from benchmarks.harness import Row, table

CORE = ("core", "kernels", "daemon", "tiers")
ENGINES = {"hf": ("hf",), "vllm": ("vllm",), "sglang": ("sglang", "sglang_linker")}
PARTS = {"backends": ("file", "redis", "s3", "mooncake"), "kernels": ("device",)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="where the rows go")
    parser.add_argument("--engine", choices=sorted(ENGINES), help="rows of this engine instead")
    parser.add_argument("--part", choices=sorted(PARTS), help="rows of this part instead")
    options = parser.parse_args()
    started = time.perf_counter()
    rows: list[Row] = []
    names = ENGINES[options.engine] if options.engine else PARTS[options.part] if options.part else CORE
    for name in names:
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            rows.append(row)
            print(table([row]), file=sys.stderr, flush=True)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=1))
    print(table(rows))
    missed = [row.name for row in rows if not row.holds]
    print(
        f"{len(rows)} rows in {time.perf_counter() - started:.0f} s, {len(missed)} below their bar; raw: {options.out}"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
