"""URL -> Cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmcache_sdk.api import Bytes, Chain, Lookup, Part, Reservation, Stats, Ticket
from lmcache_sdk.backend import Url
from lmcache_sdk.daemon.client import DaemonCache
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.lineage import Lineage
from lmcache_sdk.spec import WHOLE, Namespace, Producer, Share
from lmcache_sdk.store import Limits, Store
from lmcache_sdk.tiers import open_tiers

DAEMON_SCHEME = "unix"


class LocalCache:
    """The Cache protocol over a Store of this process. See :class:`lmcache_sdk.api.Cache` for the methods.

    Args:
        store: closed with this cache.
        lineage: what the engine's memory holds; by default that of this cache alone.
    """

    def __init__(
        self,
        store: Store,
        namespace: Namespace,
        producer: Producer,
        *,
        share: str = Share.VERIFIED,
        lineage: Lineage | None = None,
    ) -> None:
        self.store = store
        self._share = Share.of(share)
        self._lineage = lineage or Lineage()
        self._opened = store.open_space(namespace, producer)

    @property
    def namespace(self) -> Namespace:
        return self._opened.namespace

    @property
    def producer(self) -> Producer:
        return self._opened.producer

    def lookup(self, rid: str, chain: Chain, *, over: Part = WHOLE, prefetch: bool = True) -> Lookup:
        del over  # a chunk is ready only when all its cells are, whatever the asker holds
        return self.store.lookup(self._opened, rid, chain, share=self._share, prefetch=prefetch)

    def wait(self, rid: str, timeout_s: float, *, settle: bool = True) -> Lookup:
        return self.store.wait(rid, timeout_s, settle=settle)

    def claim(self, rid: str, boundary: int, *, first: int = 0, parts: int = 1) -> Ticket | None:
        return self.store.claim(rid, boundary, first, parts)

    def take(self, ticket: Ticket, part: int = 0) -> bool:
        self._lineage.loaded(ticket)
        return ticket.boot == self.store.boot and 0 <= part < ticket.parts

    def release(self, ticket: Ticket, part: int = 0) -> None:
        self.store.release(ticket, part)

    def forget(self, rid: str) -> None:
        self.store.forget(rid)

    def reserve(self, rid: str, chain: Chain, first: int, count: int, part: Part = WHOLE) -> Reservation | None:
        del rid  # what a request has loaded its engine may have given to another one: the chain tells
        if chain.chunk_tokens != self._opened.spec.chunk_tokens or first < 0 or count < 1:
            return None
        digests = chain.digests(first + count)
        return self.store.reserve(
            self._opened,
            digests[first:],
            first,
            self._opened.spec.cells_of(part),
            parent=digests[first - 1] if 0 < first <= len(digests) else None,
            tenant=chain.tenant,
            positions_known=chain.positions_known,
            inexact=self._lineage.first_inexact(chain, first + count),
            share=self._share,
        )

    def publish(self, reservation: Reservation, chunks: Sequence[int] | None = None) -> None:
        self.store.publish(reservation, chunks)

    def abort(self, reservation: Reservation) -> None:
        self.store.abort(reservation)

    def segments(self, boot: str) -> Sequence[Bytes]:
        return self.store.pool.segments if boot == self.store.boot else ()

    def pin(self, chain: Chain, ttl_s: float) -> int:
        return self.store.pin(self._opened, chain.digests(), ttl_s)

    def delete(self, chain: Chain) -> int:
        return self.store.delete(self._opened, chain.digests())

    def clear(self) -> int:
        return self.store.clear(self._opened)

    def stats(self) -> Stats:
        return self.store.stats()

    def drain(self, timeout_s: float) -> bool:
        return self.store.drain(timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        self.store.close(timeout_s)


def open_cache(
    url: str | Sequence[str],
    *,
    namespace: Namespace,
    producer: Producer,
    pool_bytes: int = 1 << 30,
    limits: Limits | None = None,
    shared: bool = False,
    share: str = Share.VERIFIED,
    lineage: Lineage | None = None,
) -> LocalCache | DaemonCache:
    """The cache that a URL names: a daemon (``unix:///path/of/socket``), or a store with a pool in this process.

    Args:
        url: ``unix:///run/user/1000/lmcache-sdk.sock``, ``lmdb:///var/lib/kv?size=50GiB``, ``memory://`` …; several
            stores are tiers, fastest first, and may have options behind ``#``, see ``docs/tiers.md``.
        pool_bytes, limits: of a pool in this process.
        shared: other processes than this one will copy, too (workers of an engine). A store then gets a daemon of its
            own, which has a pool of ``pool_bytes`` and ends with the cache, or with this process.
        share: whose chunks are loaded beside the producer's own, see :class:`~lmcache_sdk.spec.Share`.
        lineage: what the engine's memory holds; by default that of this cache alone.

    Raises:
        ConfigError: unknown scheme, bad parameter, a pool too small for one chunk.
        BackendError: a store that cannot be opened.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if not urls:
        raise ConfigError("no cache URL was given; expected something like lmdb:///var/lib/kv?size=50GiB")
    namespace.spec.validate()
    Share.of(share)
    daemons = [text for text in urls if text.startswith(f"{DAEMON_SCHEME}://")]
    if daemons:
        if len(urls) > 1:
            raise ConfigError(f"{daemons[0]!r} is a daemon, which has tiers of its own; give it alone")
        return DaemonCache(_socket_path(daemons[0]), namespace, producer, share=share, lineage=lineage)
    if shared:
        from lmcache_sdk.daemon.private import PrivateCache, start_private

        return PrivateCache(start_private(urls, pool_bytes), namespace, producer, share=share, lineage=lineage)
    tiers = open_tiers(urls)
    try:
        store = Store(tiers, pool_bytes=pool_bytes, limits=limits)
        try:
            return LocalCache(store, namespace, producer, share=share, lineage=lineage)
        except BaseException:
            store.close(1.0)  # its threads, too
            raise
    except BaseException:
        for tier in tiers:
            tier.backend.close(1.0)
        raise


def _socket_path(url: str) -> Path:
    parsed = Url(url)
    parsed.finish()
    if parsed.host or len(parsed.path) < 2:
        raise ConfigError(f"{url!r} has no absolute path; write unix:///path/of/socket with three slashes")
    return Path(parsed.path)
