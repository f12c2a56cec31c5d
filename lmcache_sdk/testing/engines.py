"""The conformance suite of engine adapters: subclass :class:`EngineTests` for an engine that speaks the protocol of
:mod:`lmcache_sdk.testing.harness`.

    class TestMyEngine(EngineTests):
        has_own_cache = runs_together = True

        @pytest.fixture(scope="class")
        @classmethod
        def start(cls, tmp_path_factory):
            def start(url, memory_tokens): ...       # an EngineHarness that has not been started
            return start

        @pytest.fixture(scope="class")
        @classmethod
        def daemon(cls): ...                         # a Daemon that runs

One engine process serves most scenarios; each has prompts of its own. What is loaded must give what was computed: the
same tokens, and the same log probabilities to the last bit, which an engine with a tiny model of its own keeps.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np
import pytest

from lmcache_sdk.backend import Item, Scan, open_backend
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import open_cache
from lmcache_sdk.spec import Namespace, Producer
from lmcache_sdk.testing.harness import EngineError, EngineHarness

Answer = dict[str, Any]
NEW_TOKENS = 8


class Daemon(Protocol):
    """A daemon process that can be killed and started again at the same place, and has a store to write to.

    Attributes:
        url: where it listens.
        tier: URL of its store, which is free for others while it does not run.
    """

    url: str
    tier: str

    def start(self) -> None: ...

    def stop(self, number: int = signal.SIGTERM) -> int: ...

    def forget_pool(self) -> None:
        """What it keeps in memory is gone at its next start."""
        ...


Start = Callable[[str | None, int], EngineHarness]


class EngineTests:
    """See the module's docstring. Fixtures that a subclass gives: ``start`` and ``daemon``, both of class scope.

    ``start(url, memory_tokens)``: an engine with this cache (None = none), whose KV memory holds so many tokens, where
    that can be chosen.
    """

    has_own_cache: ClassVar[bool] = False
    runs_together: ClassVar[bool] = False
    vocabulary: ClassVar[tuple[int, int]] = (10, 1000)
    seed: ClassVar[int] = int(os.environ.get("LMCACHE_SDK_TEST_SEED", "0"))
    memory_tokens: ClassVar[int] = 2400

    _prompts = 0

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, start: Start, daemon: Daemon) -> Iterator[EngineHarness]:
        with start(daemon.url, cls.memory_tokens) as harness:
            yield harness
            assert harness.stop() == 0

    def prompt(self, tokens: int) -> list[int]:
        """Another one each time."""
        type(self)._prompts += 1
        random = np.random.default_rng([self.seed, self._prompts])
        return [int(token) for token in random.integers(*self.vocabulary, tokens)]

    def hit(self, engine: EngineHarness, tokens: int, stored: int) -> int:
        """Tokens that can be loaded of a prompt, of which so many are stored."""
        chunk, block = engine.hello["chunk_tokens"], engine.hello.get("block_tokens")
        found = min(stored // chunk * chunk, tokens - 1)
        return int(found // (block or chunk) * (block or chunk))

    def only_cache(self, engine: EngineHarness) -> None:
        """What comes now comes from the cache, where all has arrived."""
        assert engine.flush()
        if self.has_own_cache:
            assert engine.call("forget", 60)["forgotten"]

    def run(self, engine: EngineHarness, ids: Sequence[int], **fields: Any) -> Answer:
        return engine.generate(ids, fields.pop("max_new_tokens", NEW_TOKENS), logits=True, **fields)

    def same(self, one: Answer, other: Answer) -> None:
        assert one["token_ids"] == other["token_ids"]
        assert one["top"] == other["top"]

    @pytest.mark.timeout(300)
    def test_cold_then_warm(self, engine: EngineHarness) -> None:
        ids = self.prompt(300)
        cold = self.run(engine, ids)
        assert cold["cached_tokens"] == 0
        self.only_cache(engine)
        warm = self.run(engine, ids)
        assert warm["cached_tokens"] == self.hit(engine, 300, 300) > 0
        self.same(warm, cold)
        again = self.run(engine, ids)
        assert again["cached_tokens"] >= warm["cached_tokens"]
        self.same(again, cold)

    def test_lengths_around_chunks_and_blocks(self, engine: EngineHarness) -> None:
        chunk = engine.hello["chunk_tokens"]
        for tokens in (1, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 1):
            ids = self.prompt(tokens)
            cold = self.run(engine, ids)
            self.only_cache(engine)
            warm = self.run(engine, ids)
            assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, self.hit(engine, tokens, tokens))
            self.same(warm, cold)

    def test_what_is_loaded_is_what_is_used(self, engine: EngineHarness, daemon: Daemon) -> None:
        """Negated KV in the pool changes the reply, and a control run without the cache does not."""
        if "identity" not in engine.hello:
            pytest.skip("this engine does not say its namespace and producer")
        ids = self.prompt(300)
        cold = self.run(engine, ids)
        self.only_cache(engine)
        cache = cache_of(engine, daemon.url)
        width = cache.namespace.spec.chunk_tokens
        try:
            assert negate(cache, Chain(ids, width)) == 300 // width
            wrong = self.run(engine, ids, store=False)
            assert wrong["cached_tokens"] == self.hit(engine, 300, 300)
            assert wrong["top"] != cold["top"]
            if self.has_own_cache:
                assert engine.call("forget", 60)["forgotten"]
            self.same(self.run(engine, ids, load=False, store=False), cold)
        finally:
            cache.delete(Chain(ids, width))
            cache.close()
        if self.has_own_cache:
            assert engine.call("forget", 60)["forgotten"]

    def test_a_shared_prefix(self, engine: EngineHarness) -> None:
        shared = self.prompt(200)
        self.run(engine, shared + self.prompt(50))
        self.only_cache(engine)
        ids = shared + self.prompt(70)
        warm = self.run(engine, ids)
        assert warm["cached_tokens"] == self.hit(engine, 270, 200)
        if self.has_own_cache:
            assert engine.call("forget", 60)["forgotten"]
        self.same(warm, self.run(engine, ids, load=False))

    def test_chat_turns(self, engine: EngineHarness) -> None:
        conversation = self.prompt(150)
        for _ in range(3):
            reply = self.run(engine, conversation, max_new_tokens=40)
            conversation += [*reply["token_ids"], *self.prompt(20)]
            self.only_cache(engine)
            known = len(conversation) - 21  # the last token of a reply is never computed
            warm = self.run(engine, conversation)
            assert warm["cached_tokens"] == self.hit(engine, len(conversation), known)
            if self.has_own_cache:
                assert engine.call("forget", 60)["forgotten"]
            assert self.run(engine, conversation, load=False)["token_ids"] == warm["token_ids"]

    def test_salts_are_apart(self, engine: EngineHarness) -> None:
        ids = self.prompt(200)
        for salt, cached in (("a", 0), ("b", 0), (None, 0), ("a", self.hit(engine, 200, 200))):
            assert self.run(engine, ids, cache_salt=salt)["cached_tokens"] == cached
            self.only_cache(engine)

    def test_what_a_request_may_ask_for(self, engine: EngineHarness) -> None:
        ids = self.prompt(200)
        cold = self.run(engine, ids, store=False)
        self.only_cache(engine)
        self.same(self.run(engine, ids), cold)
        self.only_cache(engine)
        alone = self.run(engine, ids, load=False)
        assert alone["cached_tokens"] == 0
        self.only_cache(engine)
        warm = self.run(engine, ids)
        assert warm["cached_tokens"] == self.hit(engine, 200, 200)
        self.same(warm, cold)

    def test_requests_together(self, engine: EngineHarness) -> None:
        """With a shared prefix, loaded and not, at once; the tokens are those of one after another."""
        if not self.runs_together:
            pytest.skip("one request after another")
        shared = self.prompt(150)
        self.run(engine, shared)
        self.only_cache(engine)
        prompts = [shared + self.prompt(60), shared + self.prompt(80), self.prompt(200), shared + self.prompt(90)]
        numbers = [engine.send("generate", ids=ids, max_new_tokens=NEW_TOKENS) for ids in prompts]
        replies = [engine.receive(number, 60) for number in numbers]
        assert [bool(reply["cached_tokens"]) for reply in replies] == [True, True, False, True]
        for ids, reply in zip(prompts, replies, strict=True):
            self.only_cache(engine)
            assert self.run(engine, ids, load=False)["token_ids"] == reply["token_ids"]

    def test_eviction_under_pressure(self, engine: EngineHarness) -> None:
        """The engine's memory holds no two of these; the cache holds them all."""
        if not self.has_own_cache:
            pytest.skip("nothing to be evicted")
        prompts = [self.prompt(int(self.memory_tokens * 0.6)) for _ in range(3)]
        colds = [self.run(engine, ids) for ids in prompts]
        assert engine.flush()
        for ids, cold in zip(prompts, colds, strict=True):
            warm = self.run(engine, ids)
            assert warm["cached_tokens"] >= self.hit(engine, len(ids), len(ids))
            self.same(warm, cold)

    def test_preemption(self, engine: EngineHarness) -> None:
        """Four requests that outgrow the memory together; each ends with the tokens that it has alone."""
        if not self.runs_together:
            pytest.skip("one request after another")
        before = engine.call("stats", 30)["preemptions"]
        prompts = [self.prompt(int(self.memory_tokens * 0.23)) for _ in range(4)]
        numbers = [engine.send("generate", ids=ids, max_new_tokens=100) for ids in prompts]
        replies = [engine.receive(number, 120) for number in numbers]
        assert engine.call("stats", 30)["preemptions"] > before
        for ids, reply in zip(prompts, replies, strict=True):
            self.only_cache(engine)
            alone = engine.generate(ids, 100, load=False, store=False)
            assert alone["token_ids"][:50] == reply["token_ids"][:50]  # recomputed tails round otherwise

    def test_abort(self, engine: EngineHarness) -> None:
        if not self.runs_together:
            pytest.skip("one request after another")
        ids = self.prompt(1000)
        cold = self.run(engine, ids)
        self.only_cache(engine)
        for _ in range(5):
            number = engine.send("generate", ids=ids, max_new_tokens=500)
            assert engine.call("abort", 30, target=number)["aborted"]
            with pytest.raises(EngineError, match="aborted"):
                engine.receive(number, 30)
        self.only_cache(engine)
        warm = self.run(engine, ids)
        assert warm["cached_tokens"] == self.hit(engine, 1000, 1000)
        self.same(warm, cold)

    @pytest.mark.timeout(300)
    def test_the_daemon_is_killed_and_comes_back(self, engine: EngineHarness, daemon: Daemon) -> None:
        ids = self.prompt(300)
        cold = self.run(engine, ids)
        self.only_cache(engine)
        number = engine.send("generate", ids=ids, max_new_tokens=60, logits=True)
        daemon.stop(signal.SIGKILL)
        reply = engine.receive(number, 60)
        assert reply["token_ids"][:NEW_TOKENS] == cold["token_ids"]
        if self.has_own_cache:
            assert engine.call("forget", 60)["forgotten"]
        alone = self.run(engine, ids)
        assert alone["cached_tokens"] == 0
        self.same(alone, cold)
        if self.has_own_cache:
            assert engine.call("forget", 60)["forgotten"]
        daemon.start()
        _until(lambda: bool((engine.stats() or {}).get("pool", {}).get("total_bytes")), "the engine is back")
        self.run(engine, ids)
        self.only_cache(engine)
        warm = self.run(engine, ids)
        assert warm["cached_tokens"] == self.hit(engine, 300, 300)
        self.same(warm, cold)

    @pytest.mark.timeout(300)
    def test_a_corrupted_record_is_a_miss(self, engine: EngineHarness, daemon: Daemon) -> None:
        ids = self.prompt(300)
        cold = self.run(engine, ids)
        self.only_cache(engine)
        daemon.stop()
        daemon.forget_pool()
        assert _flip_a_bit_of_each(daemon.tier) >= 300 // engine.hello["chunk_tokens"]
        daemon.start()
        _until(lambda: bool((engine.stats() or {}).get("pool", {}).get("total_bytes")), "the engine is back")
        reply = self.run(engine, ids)
        assert reply["cached_tokens"] == 0
        self.same(reply, cold)

    @pytest.mark.timeout(300)
    def test_two_processes_share_a_daemon(self, engine: EngineHarness, start: Start, daemon: Daemon) -> None:
        ids = self.prompt(300)
        cold = self.run(engine, ids)
        assert engine.flush()
        with start(daemon.url, self.memory_tokens) as second:
            warm = self.run(second, ids)
            assert warm["cached_tokens"] == self.hit(second, 300, 300)
            self.same(warm, cold)
            other = self.prompt(300)
            cold = self.run(second, other)
            assert second.flush()
            warm = self.run(engine, other)
            assert warm["cached_tokens"] == self.hit(engine, 300, 300)
            self.same(warm, cold)
            second.kill()
        self.only_cache(engine)
        self.same(self.run(engine, other), cold)


def cache_of(engine: EngineHarness, url: str) -> DaemonCache:
    """A client of a daemon that sees what an engine sees, which says its ``identity``."""
    namespace, producer = engine.hello["identity"]
    cache = open_cache(
        url, namespace=msgspec.convert(namespace, Namespace), producer=msgspec.convert(producer, Producer)
    )
    assert isinstance(cache, DaemonCache)
    return cache


def negate(cache: DaemonCache, chain: Chain, heads: range | None = None) -> int:
    """Turn the sign of what the pool has of a chain, where it lies: of all cells, or of those that begin with one of
    these heads. The answer is how many chunks.
    """
    cache.lookup("negate", chain)
    ticket = cache.claim("negate", cache.wait("negate", 10).chunks)
    assert ticket is not None and cache.take(ticket)
    spec, segments = cache.namespace.spec, cache.segments(ticket.boot)
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[spec.groups[0].dtype]
    for chunk in ticket.places():
        for (segment, offset), number in zip(chunk.tolist(), ticket.cells, strict=True):
            cell = spec.cells[number]
            if heads is None or cell.heads[0] in heads:
                segments[segment][offset + width - 1 : offset + cell.nbytes : width] ^= np.uint8(0x80)
    cache.release(ticket)
    cache.forget("negate")
    return ticket.boundary


def _flip_a_bit_of_each(url: str) -> int:
    """In the last byte of each record of a store; the answer is how many."""
    backend = open_backend(url)
    assert isinstance(backend, Scan)
    try:
        records = [record for record in backend.scan() if not record.key.endswith("/manifest")]
        for record in records:
            content = bytearray(record.nbytes)
            assert backend.get([record.key], [memoryview(content)]) == [record.nbytes]
            content[-1] ^= 1
            assert backend.put([Item(record.key, memoryview(content))], if_absent=False) == [True]
        return len(records)
    finally:
        backend.close(10.0)


def _until(true: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    started, pause = time.monotonic(), threading.Event()
    while not true():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        pause.wait(0.02)
