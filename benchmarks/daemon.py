"""The daemon, in a process of its own: copies into and out of its pool, lookups, many clients at once, large indexes,
deadlines.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np

from benchmarks.clients import looking_up
from benchmarks.harness import Paired, Row, at_least, at_most, measure, paired, table, timed
from benchmarks.memory import NBYTES, TOKENS, PagedMemory, Slots, buffer
from benchmarks.prompts import LONG_PROMPT, MODEL, TINY, bare_hash_loop, namespace, store, tokens
from benchmarks.serve import connect, running
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.daemon.client import CALL_TIMEOUT_S, DaemonCache
from lmcache_sdk.keys import DIGEST_BYTES, Chain
from lmcache_sdk.pool import extent_bytes

CLIENTS = 64
CLIENTS_S = 2.0
FEW, MANY = 1024, 1_000_000  # chunks
INDEX_CHUNK_TOKENS = LONG_PROMPT // FEW
BATCH = 256


# Copies


def copies(repeats: int = 15) -> Iterator[Row]:
    """4,096 tokens of 128 KiB each, from and to an engine's paged memory in this process, against a plain copy.

    Steady state: each store evicts an older prompt, and whatever is touched has been touched before. What the daemon
    does behind a store (checksums) has ended before the next measurement.
    """
    patterns = (("permuted 16-token pages", 16, 0.6), ("merged runs", 16, 0.75), ("128-token pages", 128, 0.75))
    for chunk_tokens in (64, 256):
        space = namespace(chunk_tokens, *MODEL)
        chunks = TOKENS // chunk_tokens
        # Two prompts and a half: half of the pool is what one client may hold.
        with running(5 * chunks * extent_bytes(space.spec.chunk_bytes) // 2) as daemon:
            cache = connect(daemon.socket, space)
            prompts = (tokens(seed, TOKENS) for seed in itertools.count())
            for pattern, page_tokens, bar in patterns:
                for verb, result in _copies(cache, chunk_tokens, pattern, page_tokens, prompts, repeats):
                    yield at_least(f"daemon {verb}, NHD, {pattern}, chunks of {chunk_tokens} / plain copy", result, bar)
            cache.close()


def _copies(
    cache: DaemonCache,
    chunk_tokens: int,
    pattern: str,
    page_tokens: int,
    prompts: Iterator[np.ndarray],
    repeats: int,
) -> Iterator[tuple[str, Paired]]:
    source, target = buffer(NBYTES, seed=1), buffer(NBYTES)
    engine = PagedMemory(page_tokens)
    slots = np.arange(TOKENS) if pattern == "merged runs" else engine.permuted()
    connector = GPUConnector(cache, engine.layout, write_op=engine.write)
    for _ in range(3):
        last = next(prompts)
        _store(connector, Chain(last, chunk_tokens), slots)
        assert cache.drain(10)
    verbs: tuple[tuple[str, Callable[[], None]], ...] = (
        ("load", lambda: _load(cache, connector, Chain(last, chunk_tokens), slots)),
        ("store", lambda: _store(connector, Chain(next(prompts), chunk_tokens), slots)),
    )
    for verb, run in verbs:
        yield verb, paired(run, lambda: np.copyto(target, source), NBYTES, repeats, lambda: cache.drain(10))
    connector.close()


def _store(connector: GPUConnector, chain: Chain, slots: Slots) -> None:
    transfer = connector.store("store", chain, 0, slots)
    assert transfer.wait(60) and not transfer.failed_chunks()


def _load(cache: DaemonCache, connector: GPUConnector, chain: Chain, slots: Slots) -> None:
    found = cache.lookup("load", chain)
    assert found.chunks == len(chain), found
    ticket = cache.claim("load", found.chunks)
    assert ticket is not None
    transfer = connector.load(ticket, slots)
    assert transfer.wait(60) and not transfer.failed_chunks()
    cache.forget("load")


# Lookups


class _Looker:
    """Looks for one prompt again and again; ``settle`` forgets the last request."""

    def __init__(self, cache: DaemonCache, prompt: np.ndarray, expected: int) -> None:
        self._cache = cache
        self._prompt = prompt
        self._expected = expected
        self._number = 0

    def look(self) -> None:
        found = self._cache.lookup(str(self._number), Chain(self._prompt, self._cache.namespace.spec.chunk_tokens))
        assert found.chunks == self._expected, found

    def settle(self) -> None:
        self._cache.forget(str(self._number))
        self._number += 1


def lookups(repeats: int = 200) -> Iterator[Row]:
    """A 128k-token prompt that is all there, and one that is not."""
    prompt, other = tokens(0, LONG_PROMPT), tokens(1, LONG_PROMPT)
    data = prompt.tobytes()
    for chunk_tokens in (64, 256):
        space = namespace(chunk_tokens, *TINY)
        chunks = LONG_PROMPT // chunk_tokens
        with running(64 << 20, extent_bytes=256) as daemon:
            cache = connect(daemon.socket, space)
            store(cache, Chain(prompt, chunk_tokens))
            assert cache.drain(10)
            hit = _Looker(cache, prompt, chunks)
            result = paired(
                hit.look, lambda c=chunk_tokens: bare_hash_loop(data, 4 * c), len(data), repeats, hit.settle
            )
            yield at_most(f"daemon lookup, full hit of {chunks} chunks: time / bare hashlib loop", result, 2.0)
            if chunk_tokens == 64:
                miss = _Looker(cache, other, 0)
                for pace_s, how in ((0.0, "back to back"), (0.002, "every 2 ms")):
                    seconds = []
                    for _ in range(1000):
                        time.sleep(pace_s)
                        seconds.append(timed(miss.look))
                        miss.settle()
                    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
                    yield measure(f"daemon lookup, miss, {how}: p50 in ms", 1e3 * p50, 0.3, p99_ms=1e3 * p99)
            cache.close()


# Many clients


def crowd(rounds: int = 3) -> Iterator[Row]:
    """4,096 cached tokens, hashed anew for each lookup; each client a process, and asking as fast as it can."""
    with running(256 << 20, extent_bytes=256) as daemon:
        ratios, unfair, facts = [], [], []
        for _ in range(rounds):
            rates = []
            for count in (1, CLIENTS):
                with looking_up(daemon, count, 4096) as clients:
                    clients.go()
                    time.sleep(CLIENTS_S)
                    answers = clients.stop()
                rates.append(sum(answer.lookups for answer in answers) / CLIENTS_S)
                facts.append([answer._asdict() for answer in answers])
            overall = sum(a.lookups * a.mean_s for a in answers) / sum(a.lookups for a in answers)
            unfair.append(max(answer.mean_s for answer in answers) / overall)
            ratios.append(rates[1] / rates[0])
        ratio = statistics.median(ratios)
        yield Row(
            f"daemon, {CLIENTS} clients at once: lookups a second / one client's",
            ratio,
            0.8,
            ratio >= 0.8,
            {"all": facts},
        )
        yield measure(
            f"daemon, {CLIENTS} clients at once: longest mean wait / overall mean", statistics.median(unfair), 2.0
        )


# A large index


def index(repeats: int = 60) -> Iterator[Row]:
    """Two daemons, one with a long prompt only, one with a million chunks beside it."""
    space = namespace(INDEX_CHUNK_TOKENS, *TINY)
    prompt = tokens(0, LONG_PROMPT)
    each = extent_bytes(space.spec.chunk_bytes)
    with ExitStack() as stack:
        daemons = [stack.enter_context(running(n * each, extent_bytes=each)) for n in (64 * FEW, MANY)]
        caches = [connect(daemon.socket, space) for daemon in daemons]
        few, many = caches
        before = daemons[1].own_bytes()
        with looking_up(daemons[1], 1, 0, pace_s=0.001) as clients:
            clients.go()
            for _ in range((MANY - FEW) // BATCH):
                store(many, _unknown_chain())
            for cache in caches:  # as the last: what has been used less is evicted first
                store(cache, Chain(prompt, INDEX_CHUNK_TOKENS))
            assert many.drain(120)
            filling = clients.stop()[0]
        chunks = many.stats().chunks
        each_entry = (daemons[1].own_bytes() - before) / chunks
        yield measure(f"daemon, index of {chunks} chunks: bytes per entry", each_entry, 0.0)
        lookers = [_Looker(cache, prompt, FEW) for cache in caches]
        result = _both(lookers[1].look, lookers[0].look, repeats, lambda: [looker.settle() for looker in lookers])
        yield at_most(f"daemon lookup, {FEW} chunks of {chunks}: time / of {FEW}", result, 1.5)
        result = _both(
            lambda: store(many, _unknown_chain(64)), lambda: store(few, _unknown_chain(64)), repeats, lambda: None
        )
        yield at_most(f"daemon reserve and publish, 64 chunks beside {chunks}: time / beside {FEW}", result, 3.0)
        with looking_up(daemons[1], 1, 0, pace_s=0.001) as clients:
            clients.go()
            for _ in range(400):
                store(many, _unknown_chain())
            assert many.drain(60)
            evicting = clients.stop()[0]
        with looking_up(daemons[1], 1, 0, pace_s=0.001) as clients:
            clients.go()
            assert many.clear() >= chunks
            clearing = clients.stop()[0]
        for what, answer in (("filling to", filling), ("evicting from", evicting), ("clearing", clearing)):
            name = f"daemon, another client's longest wait on it while {what} {chunks} chunks: ms"
            yield measure(name, 1e3 * answer.longest_busy_s, 50.0, **answer._asdict())
        for cache in caches:
            cache.close()


def _unknown_chain(chunks: int = BATCH) -> Chain:
    blob = os.urandom(DIGEST_BYTES * chunks)
    digests = [blob[at : at + DIGEST_BYTES] for at in range(0, len(blob), DIGEST_BYTES)]
    return Chain.from_digests(digests, INDEX_CHUNK_TOKENS)


def _both(
    function: Callable[[], object], reference: Callable[[], object], repeats: int, settle: Callable[[], object]
) -> Paired:
    """For two that must not run into each other's aftermath."""
    return paired(function, reference, 0, repeats, settle)


# No daemon


def deadlines() -> Iterator[Row]:
    """The daemon is stopped; every kind of call meets that once, the ones after it an open breaker."""
    space = namespace(64, *TINY)
    chain = Chain(tokens(0, 4096), 64)
    over, opened = [], []
    with running(64 << 20, extent_bytes=256) as daemon:
        cache = connect(daemon.socket, space, CALL_TIMEOUT_S)
        calls: list[Callable[[], object]] = [
            lambda: cache.lookup("request", chain),
            lambda: cache.claim("request", 1),
            lambda: cache.reserve("request", chain, 0, 64),
            lambda: cache.forget("request"),
            cache.stats,
        ]
        for call in calls:
            os.kill(daemon.pid, signal.SIGSTOP)
            over.append(timed(call) - CALL_TIMEOUT_S)
            assert not cache.connected
            opened += [timed(lambda: cache.lookup("request", chain)) for _ in range(100)]
            os.kill(daemon.pid, signal.SIGCONT)
            while not cache.connected:
                time.sleep(0.01)
        cache.close()
    yield measure("daemon stopped: longest time beyond a call's deadline, ms", 1e3 * max(over), 50.0, seconds=over)
    yield measure("breaker open: lookup, p50 in µs", 1e6 * statistics.median(opened), 50.0, longest_s=max(opened))


def rows() -> Iterator[Row]:
    yield from deadlines()
    yield from lookups()
    yield from crowd()
    yield from index()
    yield from copies()


if __name__ == "__main__":
    import sys

    for part in sys.argv[1:] or ["deadlines", "lookups", "crowd", "index", "copies"]:
        for row in globals()[part]():
            speed = f"  {row.raw['gbps']:.1f} of {row.raw['reference_gbps']:.1f} GB/s" if row.raw.get("gbps") else ""
            print(table([row]) + speed, flush=True)
