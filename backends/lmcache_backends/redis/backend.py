"""The backend: its calls as commands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

from lmcache_backends.redis.link import Link, ProtocolError, Refused, Reply, bulk, command
from lmcache_backends.redis.servers import Node, Part, connect
from lmcache_backends.redis.settings import Settings, read
from lmcache_backends.redis.trouble import refusal
from lmcache_sdk.backend import Buffer, Item, Miss, Stat, Url, UsageReport, leading
from lmcache_sdk.calls import Calls
from lmcache_sdk.errors import BackendUnavailable

_DEPTH = 2  # values asked for at a time; more makes the server queue them, which halves its speed
_HOPS = 5  # a key is sought on so many nodes
_PAGE = 1000  # keys of a scan at a time
_ASKING = command(b"ASKING")


class RedisBackend:
    """Records as strings in Redis or Valkey, one server or a cluster.

    The server evicts and expires: what is gone is a miss. A call uses one connection at a time, and one value is under
    way on it while the next is asked for.
    """

    instant: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._expiry = (b"PX", b"%d" % settings.ttl_ms) if settings.ttl_ms else ()
        self._servers = connect(settings)
        self._calls = Calls(settings.shown, self._servers.close)

    @classmethod
    def from_url(cls, url: Url) -> Self:
        """``redis://[user[:password]@]host[:port][/db][?ttl=7d]``; ``docs/redis.md`` has the rest.

        Raises ConfigError, or BackendUnavailable where the server cannot be used.
        """
        return cls(read(url))

    def get(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[int | Miss]:
        views = [*buffers]
        words = _encoded(keys)
        if len(words) != len(views):
            raise ValueError(f"{len(words)} keys, {len(views)} buffers")

        def work(link: Link, indexes: Sequence[int]) -> Iterator[int | Miss | Refused]:
            for turn, index in enumerate(indexes):
                for ahead in indexes[turn + _DEPTH - 1 if turn else 0 : turn + _DEPTH]:
                    link.send(command(b"GET", words[ahead]))
                answer = link.receive(views[index])
                foreign = isinstance(answer, Refused) and answer.code == "WRONGTYPE"
                yield Miss.ABSENT if foreign else answer

        return self._each(words, work)

    def put(self, items: Sequence[Item], *, if_absent: bool = True) -> list[bool]:
        words = _encoded([item.key for item in items])
        options = [*self._expiry, *([b"NX"] if if_absent else [])]
        rest = b"\r\n" + b"".join(map(bulk, options))

        def work(link: Link, indexes: Sequence[int]) -> Iterator[bool | Refused]:
            for index in indexes:
                data = items[index].data
                start = command(b"SET", words[index], more=1 + len(options)) + b"$%d\r\n" % data.nbytes
                link.send(start, data, rest)
                reply = link.reply()
                if not (reply is None or reply == b"OK" or isinstance(reply, Refused)):
                    raise ProtocolError("no answer to SET")
                yield reply if isinstance(reply, Refused) else reply is not None

        return self._each(words, work)

    def contains(self, keys: Sequence[str]) -> list[bool]:
        return [count > 0 for count in self._counts(b"EXISTS", _encoded(keys))]

    def prefix_len(self, keys: Sequence[str]) -> int:
        return leading(self.contains(keys))

    def delete(self, keys: Sequence[str]) -> int:
        return sum(self._counts(b"UNLINK", _encoded(keys)))

    def touch(self, keys: Sequence[str]) -> None:
        self._counts(b"TOUCH", _encoded(keys))

    def scan(self, prefix: str = "") -> Iterator[Stat]:
        self._calls.check()
        pattern = re.sub(rb"([*?\[\]\\^])", rb"\\\1", prefix.encode()) + b"*"
        for node in self._servers.nodes():
            # A key may come several times.
            seen: set[bytes] = set()
            cursor = b"0"
            while True:
                cursor, found = self._page(node, cursor, pattern)
                new = [key for key in dict.fromkeys(found) if key not in seen and key.isascii()]
                seen.update(new)
                lengths = self._counts(b"STRLEN", new)
                for key, nbytes in zip(new, lengths, strict=True):
                    if nbytes or self._counts(b"EXISTS", [key]) == [1]:
                        yield Stat(key.decode(), nbytes)
                if cursor == b"0":
                    break

    def usage(self) -> UsageReport:
        """Of the whole servers, whatever else they hold."""
        with self._calls:
            reports = [self._usage(node) for node in self._servers.nodes()]
        records, used, capacities, evictions = zip(*reports, strict=True)
        bounded = all(capacities)
        return UsageReport(sum(records), sum(used), sum(capacities) if bounded else 0, sum(evictions))

    def close(self, timeout_s: float) -> None:
        self._calls.close(timeout_s)

    def _counts(self, name: bytes, words: Sequence[bytes]) -> list[int]:
        """A command that takes one key and answers with a number, for each key, in one round trip to each node."""
        start = command(name, more=1)

        def work(link: Link, indexes: Sequence[int]) -> list[int | Refused]:
            questions = b"".join([b"%s$%d\r\n%s\r\n" % (start, len(words[i]), words[i]) for i in indexes])
            link.send(questions, commands=len(indexes))
            return link.counts(len(indexes))

        return self._each(words, work)

    def _each(self, words: Sequence[bytes], work: Callable[[Link, Sequence[int]], Iterable[Any]]) -> list[Any]:
        """Answers in the order of the keys; ``work`` gives those of the keys that one node has.

        A key that the cluster has elsewhere is tried there.
        """
        answers: list[Any] = [None] * len(words)
        with self._calls:
            if not words:
                return answers
            parts = self._servers.parts(words)
            for _ in range(_HOPS):
                elsewhere: list[tuple[int, Refused]] = []
                for part in parts:
                    for index, answer in self._answers(part, work):
                        if isinstance(answer, Refused):
                            elsewhere.append((index, answer))
                        else:
                            answers[index] = answer
                if not elsewhere:
                    return answers
                parts = self._servers.moved(elsewhere)
                if not parts:
                    raise refusal(self._settings.shown, elsewhere[0][1], self._settings)
        raise BackendUnavailable(f"{self._settings.shown}: its nodes do not agree who has which keys; try again later")

    def _answers(self, part: Part, work: Callable[[Link, Sequence[int]], Iterable[Any]]) -> Iterator[tuple[int, Any]]:
        """Refusals only of keys that are elsewhere."""
        try:
            with part.node.link() as link:
                if part.asking:
                    link.send(_ASKING)
                    link.reply()
                for index, answer in zip(part.indexes, work(link, part.indexes), strict=True):
                    if isinstance(answer, Refused) and answer.code not in ("MOVED", "ASK"):
                        raise refusal(part.node.place, answer, self._settings)
                    yield index, answer
        except BackendUnavailable:
            self._servers.failed()
            raise

    def _page(self, node: Node, cursor: bytes, pattern: bytes) -> tuple[bytes, list[bytes]]:
        with self._calls:
            reply = node.ask(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % _PAGE, b"TYPE", b"string")
        if isinstance(reply, list) and len(reply) == 2:
            following, found = reply
            if isinstance(following, bytes) and isinstance(found, list):
                return following, [key for key in found if isinstance(key, bytes)]
        raise BackendUnavailable(f"{node.place} does not talk as Redis does: no answer to SCAN")

    def _usage(self, node: Node) -> tuple[int, int, int, int]:
        records = node.ask(b"DBSIZE")
        facts = _facts(node.ask(b"INFO"))
        try:
            used, capacity, evictions = (int(facts[name]) for name in ("used_memory", "maxmemory", "evicted_keys"))
        except (KeyError, ValueError):
            raise BackendUnavailable(f"{node.place} does not talk as Redis does: no answer to INFO") from None
        return records if isinstance(records, int) else 0, used, capacity, evictions


def _facts(reply: Reply) -> dict[str, str]:
    lines = reply.decode("utf-8", "replace").splitlines() if isinstance(reply, bytes) else []
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _encoded(keys: Sequence[str]) -> list[bytes]:
    return [key.encode() for key in keys]
