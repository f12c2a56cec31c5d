"""Daemon and engines under load, killed at random, again and again; every load is compared with what was stored.

    python tests/daemon/soak.py [--cycles 200] [--seed N]

Ends with status 1 if one byte was wrong, if the daemon's books do not add up, or if memory did not come back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind what is installed, which is what is tested

from lmcache_sdk.daemon.client import DaemonCache
from tests.core import engine
from tests.daemon.daemon_process import Daemon, Process, until
from tests.daemon.engine_process import Engine, layered

PROMPTS, MOST_CHUNKS, CLIENTS = 16, 6, 3
POOL_BYTES = 160 << 10  # half of what all prompts need: memory changes hands all the time


class Load(Process):
    """An engine that stores and loads until it is killed."""

    def __init__(self, daemon: Daemon, seed: int, totals: Counter[str]) -> None:
        line = [sys.executable, __file__, "--engine", str(daemon.socket), "--seed", str(seed)]
        super().__init__(line, daemon.folder / "engines.log")
        self._totals = totals
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.endswith("\n"):
                self._totals.update(json.loads(line))

    def kill(self) -> None:
        self.child.kill()
        self.child.wait(20)
        self._reader.join(20)
        super().kill()


def soak(cycles: int, seed: int, *, lmdb: bool) -> Counter[str]:
    """Counts of what was done. Raises AssertionError for anything that must not be."""
    rng = random.Random(seed)
    totals: Counter[str] = Counter()
    numbers = iter(range(seed, seed + 1_000_000))
    with Daemon(pool_bytes=POOL_BYTES, lmdb=lmdb, hold_s=1.0) as daemon:
        daemon.start()
        engines = [Load(daemon, next(numbers), totals) for _ in range(CLIENTS)]
        try:
            until(lambda: totals["chunks loaded"] > 20, 30, "a beginning")
            for cycle in range(cycles):
                strike(rng, daemon, engines, numbers, totals)
                daemon.check()
                assert not totals["wrong"], f"wrong bytes in cycle {cycle}"
                if cycle % 12 == 11:
                    for each in engines:
                        each.kill()
                    until(lambda: daemon.check()["clients"] == 0, 10, "noticing that all engines have ended")
                    figures = daemon.settled(10)
                    totals["record_failures"] += int(figures["record_failures"])
                    engines[:] = [Load(daemon, next(numbers), totals) for _ in range(CLIENTS)]
        finally:
            for each in engines:
                each.kill()
        assert not totals["wrong"], "wrong bytes"
        daemon.settled(10)
    return totals


def strike(
    rng: random.Random, daemon: Daemon, engines: list[Load], numbers: Iterator[int], totals: Counter[str]
) -> None:
    """One process is killed, somewhere in its work; who is left gets on with it."""
    before, pause = totals["chunks loaded"], threading.Event()
    pause.wait(rng.random() * 0.3)
    victim = rng.randrange(CLIENTS)
    match rng.choice(["daemon", "daemon", "engine", "engine", "both", "stopped", "hung"]):
        case "daemon":
            daemon.kill()
            pause.wait(rng.choice([0.0, 0.3]))
            daemon.start()
            totals["daemon kills"] += 1
        case "engine":
            engines[victim].kill()
            engines[victim] = Load(daemon, next(numbers), totals)
            totals["engine kills"] += 1
        case "both":
            daemon.kill()
            engines[victim].kill()
            daemon.start()
            engines[victim] = Load(daemon, next(numbers), totals)
            totals["daemon kills"] += 1
            totals["engine kills"] += 1
        case "stopped":  # it goes on in another life of the daemon
            engines[victim].stop()
            daemon.kill()
            daemon.start()
            pause.wait(rng.random() * 0.5)
            engines[victim].go_on()
            totals["daemon kills"] += 1
        case "hung":
            assert daemon.process is not None
            daemon.process.stop()
            pause.wait(rng.random() * 1.2)
            daemon.process.go_on()
            engines[victim].kill()
            engines[victim] = Load(daemon, next(numbers), totals)
            totals["engine kills"] += 1
    until(lambda: totals["chunks loaded"] > before + 10, 30, "any load")


def work(socket: str, seed: int) -> None:
    """The engine: several requests at once, in all orders, some of them given up."""
    rng = random.Random(seed)
    cache = DaemonCache(Path(socket), layered(), engine.PRODUCER, call_timeout_s=0.5)
    me = Engine(cache)
    other = Engine(cache)
    while True:
        if not cache.connected:
            threading.Event().wait(0.01)
        number, chunks = rng.randrange(PROMPTS), rng.randint(1, MOST_CHUNKS)
        storing = me.store(number, chunks)
        if rng.random() < 0.1:
            storing.cancel()
        wanted = rng.randrange(PROMPTS)
        ticket = other.claim(wanted, rng.randint(1, MOST_CHUNKS))
        counts = {"lookups": 1, "stores": 1, "loads": 0, "chunks loaded": 0, "failed": 0, "wrong": 0}
        if ticket is not None and rng.random() < 0.05:
            cache.release(ticket)  # given up before it has begun
        elif ticket is not None:
            transfer, slots = other.start(ticket, wanted)
            loaded = other.finish(transfer, slots, wanted)
            counts |= {"loads": 1, "failed": len(loaded["failed"]), "wrong": len(loaded["wrong"])}
            counts["chunks loaded"] = loaded["hit"] - counts["failed"]
        if rng.random() < 0.03:
            cache.delete(me.chain(rng.randrange(PROMPTS), MOST_CHUNKS))
        if rng.random() < 0.01:
            cache.pin(me.chain(number, chunks), 0.2)
        assert storing.wait(30)
        print(json.dumps(counts), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine:
        work(options.engine, options.seed)
    started, totals = time.monotonic(), Counter[str]()
    print(f"seed {options.seed}", flush=True)
    for lmdb in (False, True):
        cycles = options.cycles - options.cycles // 2 if lmdb else options.cycles // 2
        try:
            totals += soak(cycles, options.seed + lmdb, lmdb=lmdb)
        except AssertionError:
            traceback.print_exc()
            print(f"FAILED (seed {options.seed}, {'memory over lmdb' if lmdb else 'memory'})")
            return 1
        print(f"{'memory over lmdb' if lmdb else 'memory'}: {cycles} cycles", flush=True)
    print(", ".join(f"{count:,} {name}" for name, count in sorted(totals.items())))
    print(f"no wrong byte in {options.cycles} cycles, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
