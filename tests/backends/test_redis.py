"""``redis://`` and its kin on real servers: the conformance suite, what only a server can do, and bad input."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import redis
from redis.crc import key_slot

from lmcache_backends.redis import RedisBackend
from lmcache_sdk.backend import Miss, Scan, Touch, Usage, open_backend
from lmcache_sdk.errors import BackendFull, BackendUnavailable, ConfigError
from lmcache_sdk.open import LocalCache
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.backends import BackendTests, item, read, some_bytes
from tests.backends.programs import free_port
from tests.backends.redis_server import Certificates, Cluster, Server, wait_until
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of

# docs/redis.md names these as what a user needs.
COMMANDS = "+get +set +exists +unlink +touch +strlen +scan +info +dbsize +ping"


def opened(url: str) -> RedisBackend:
    backend = open_backend(url)
    assert isinstance(backend, RedisBackend)
    return backend


class RedisTests(BackendTests):
    """Conformance; a subclass says which server. Each place of a test begins with an empty database."""

    durable = True
    server: Server | Cluster
    client: redis.Redis

    def url(self) -> str:
        return self.server.url()

    def open(self, place: Path) -> RedisBackend:
        mark = place / "opened"
        if not mark.exists():
            self.server.flush()
            mark.touch()
        return opened(self.url())

    def raw_get(self, backend: RedisBackend, key: str) -> bytes | None:
        return self.client.get(key)

    def raw_set(self, backend: RedisBackend, key: str, data: bytes) -> None:
        self.client.set(key, data)

    def test_usage(self, storing: RedisBackend) -> None:
        """Of the whole server, which needs memory also for itself."""
        empty = storing.usage()
        assert empty.records == 0
        storing.put([item("a", some_bytes(1 << 20)), item("b", some_bytes(1 << 20))])
        report = storing.usage()
        assert report.records == 2
        assert report.used_bytes >= empty.used_bytes + (2 << 20)

    def test_many_keys(self, storing: RedisBackend) -> None:
        """More than a page of a scan, and more than one buffer of replies."""
        keys = [f"many/{number:05}/{'x' * 50}" for number in range(5000)]
        storing.put([item(key, b"v") for key in keys])
        assert storing.prefix_len([*keys, "absent", keys[0]]) == 5000
        assert storing.prefix_len([*keys[:2000], "absent", *keys[2000:]]) == 2000
        assert sorted(stat.key for stat in storing.scan("many/")) == keys
        assert storing.delete(keys[::2]) == 2500
        assert storing.contains(keys) == [False, True] * 2500

    def test_what_is_too_large_passes_by(self, storing: RedisBackend) -> None:
        """The replies behind it are found."""
        storing.put([item("a", some_bytes(300_000)), item("b", some_bytes(1000)), item("c", some_bytes(2))])
        buffers = [memoryview(bytearray(1000)) for _ in range(4)]
        assert storing.get(["a", "b", "a", "c"], buffers) == [Miss.TOO_LARGE, 1000, Miss.TOO_LARGE, 2]
        assert buffers[1] == some_bytes(1000)


class TestRedis(RedisTests):
    @pytest.fixture(autouse=True)
    def _server(self, redis_server: Server) -> Iterator[None]:
        self.server = redis_server
        with redis_server.client() as self.client:
            yield


class TestValkey(RedisTests):
    @pytest.fixture(autouse=True)
    def _server(self, valkey_server: Server) -> Iterator[None]:
        self.server = valkey_server
        with valkey_server.client() as self.client:
            yield

    def url(self) -> str:
        return self.server.url("valkey")


class TestUnixSocket(TestRedis):
    def url(self) -> str:
        return f"redis+unix://{self.server.socket}?db=0"


class TestTLS(RedisTests):
    @pytest.fixture(autouse=True)
    def _server(self, tls_server: Server) -> Iterator[None]:
        self.server = tls_server
        with tls_server.client() as self.client:
            yield

    def url(self) -> str:
        return self.server.url(parameters=f"ca={self.server.tls.ca}")


class TestACL(RedisTests):
    """A user who may do no more than a backend needs."""

    @pytest.fixture(autouse=True)
    def _server(self, locked_server: Server) -> Iterator[None]:
        self.server = locked_server
        with locked_server.client() as self.client:
            self.client.execute_command("ACL", "SETUSER", "kv", "reset", "on", ">p@ss/word", "~*", *COMMANDS.split())
            yield

    def url(self) -> str:
        return self.server.url(login="kv:p%40ss%2Fword@")


class TestCluster(RedisTests):
    @pytest.fixture(autouse=True)
    def _server(self, cluster: Cluster) -> Iterator[None]:
        self.server = cluster
        with cluster.client() as self.client:
            yield


def test_capabilities() -> None:
    assert issubclass(RedisBackend, Scan)
    assert issubclass(RedisBackend, Usage)
    assert issubclass(RedisBackend, Touch)
    assert not RedisBackend.instant


# What the server does by itself


def test_expired_is_a_miss(redis_server: Server) -> None:
    backend = opened(redis_server.url(parameters="ttl=0.2s"))
    backend.put([item("expiring", b"1" * 1000)])
    with redis_server.client() as client:
        assert 0 < client.pttl("expiring") <= 200
    wait_until(lambda: read(backend, "expiring") is Miss.ABSENT, "it does not expire")
    assert backend.put([item("expiring", b"2")]) == [True]
    backend.close(1)


def test_evicted_is_a_miss() -> None:
    with Server({"maxmemory": "32mb", "maxmemory-policy": "allkeys-lru"}) as server:
        backend = opened(server.url())
        for i in range(60):
            backend.put([item(f"k{i}", some_bytes(1 << 20, i))])
        answers = [read(backend, f"k{i}") for i in range(60)]
        assert all(answer in (Miss.ABSENT, some_bytes(1 << 20, i)) for i, answer in enumerate(answers))
        report = backend.usage()
        assert report.capacity_bytes == 32 << 20
        assert report.used_bytes <= report.capacity_bytes + (2 << 20)
        assert report.evictions == 60 - report.records >= answers.count(Miss.ABSENT) > 0
        backend.close(1)


def test_touching_keeps() -> None:
    """Redis knows only the second of a use, and samples."""
    with Server({"maxmemory": "32mb", "maxmemory-policy": "allkeys-lfu", "maxmemory-samples": "64"}) as server:
        backend = opened(server.url())
        backend.put([item(f"k{i}", some_bytes(1 << 20, i)) for i in range(20)])
        for _ in range(50):
            backend.touch(["k3", "k4", "absent"])
        backend.put([item(f"new{i}", some_bytes(1 << 20, i)) for i in range(20)])
        assert backend.contains(["k3", "k4"]) == [True, True]
        assert backend.usage().evictions > 0
        backend.close(1)


def test_full_without_eviction() -> None:
    with Server({"maxmemory": "16mb", "maxmemory-policy": "noeviction"}) as server:
        backend = opened(server.url())
        with pytest.raises(BackendFull, match="allkeys-lru"):
            backend.put([item(f"k{i}", some_bytes(1 << 20, i)) for i in range(60)])
        assert read(backend, "k0") == some_bytes(1 << 20, 0)
        assert backend.delete(["k0"]) == 1
        assert backend.put([item("small", b"1")]) == [True]
        backend.close(1)


def test_a_key_of_another_kind(redis_server: Server) -> None:
    """What another program left under that name is no record."""
    with redis_server.client() as client:
        client.lpush("foreign", "x")
        backend = opened(redis_server.url())
        assert backend.get(["foreign", "absent"], [memoryview(bytearray(9))] * 2) == [Miss.ABSENT] * 2
        assert list(backend.scan("foreign")) == []
        backend.close(1)
        client.delete("foreign")


def test_databases_are_apart(redis_server: Server) -> None:
    first, second = opened(redis_server.url()), opened(redis_server.url().replace("/0?", "/1?"))
    first.put([item("apart", b"1")])
    assert second.contains(["apart"]) == [False]
    assert first.delete(["apart"]) == 1
    first.close(1)
    second.close(1)


def test_no_more_connections_than_allowed(redis_server: Server) -> None:
    backend = opened(redis_server.url(parameters="connections=2"))
    with redis_server.client() as client:
        before = client.info("clients")["connected_clients"]
        most = 0
        records = [item(f"c{i}", some_bytes(200_000, i)) for i in range(8)]

        def work(number: int) -> None:
            for _ in range(20):
                backend.put(records[number : number + 1], if_absent=False)
                assert read(backend, records[number].key) == records[number].data

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, client.info("clients")["connected_clients"])
        assert most <= before + 1  # the first one stood before
        backend.close(1)
        wait_until(lambda: client.info("clients")["connected_clients"] == 1, "connections stay open")


def test_not_in_a_fork(redis_server: Server) -> None:
    backend = opened(redis_server.url())
    backend.put([item("forked", b"1")])
    child = os.fork()
    if not child:
        try:
            backend.get(["forked"], [memoryview(bytearray(1))])
        except BackendUnavailable as error:
            backend.close(1)
            os._exit(0 if "fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read(backend, "forked") == b"1"
    backend.close(1)


def test_a_restart_is_not_noticed() -> None:
    """Connections that stood before are not tried first."""
    with Server() as server:
        backend = opened(server.url())
        assert backend.put([item("k", b"1")]) == [True]
        server.stop(signal.SIGKILL)
        with pytest.raises(BackendUnavailable, match="nothing listens"):
            backend.contains(["k"])
        server.start()
        assert backend.put([item("k", b"2")]) == [True]
        server.stop(signal.SIGKILL)
        server.start()
        assert backend.contains(["k"]) == [False]
        backend.close(1)


# A cluster that changes


def slot_of(key: str) -> int:
    return key_slot(key.encode())


def test_slots_that_move(cluster: Cluster) -> None:
    """Half-way, where both nodes have keys of a slot, and after, when the old node sends on who asks it."""
    cluster.flush()
    backend = opened(cluster.url())
    keys = [f"{{moving}}/{i}" for i in range(4)]
    slot = slot_of(keys[0])
    ids = []
    for server in cluster.servers:
        with server.client() as client:
            ids.append(client.execute_command("CLUSTER MYID").decode())
    old = next(i for i, end in enumerate((5461, 10_922, 16_384)) if slot < end)
    new = (old + 1) % 3
    backend.put([item(key, key.encode()) for key in keys[:2]])
    with cluster.servers[old].client() as source, cluster.servers[new].client() as target:
        target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[old])
        source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[new])
        source.execute_command("MIGRATE", "127.0.0.1", cluster.servers[new].port, keys[0], 0, 5000)
        assert [read(backend, key) for key in keys] == [b"{moving}/0", b"{moving}/1", Miss.ABSENT, Miss.ABSENT]
        assert backend.put([item(key, key.encode()) for key in keys]) == [False, False, True, True]
        assert backend.contains(keys) == [True] * 4
        assert backend.delete(keys[2:3]) == 1
        source.execute_command("MIGRATE", "127.0.0.1", cluster.servers[new].port, keys[1], 0, 5000)
        for server in (cluster.servers[new], cluster.servers[old], cluster.servers[3 - old - new]):
            with server.client() as client:
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[new])
        assert [read(backend, key) for key in keys] == [b"{moving}/0", b"{moving}/1", Miss.ABSENT, b"{moving}/3"]
        assert backend.prefix_len(keys) == 2
        assert sorted(stat.key for stat in backend.scan("{moving}")) == [keys[0], keys[1], keys[3]]
        assert backend.delete(keys) == 3
    for server in (cluster.servers[old], cluster.servers[new], cluster.servers[3 - old - new]):
        with server.client() as client:
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[old])
    assert backend.put([item(keys[0], b"back")]) == [True]
    assert read(backend, keys[0]) == b"back"
    backend.close(1)


def test_a_cluster_with_tls(certificates: Certificates) -> None:
    with Cluster(tls=certificates) as cluster:
        backend = opened(cluster.url("rediss+cluster", f"ca={certificates.ca}"))
        keys = [f"k{i}" for i in range(30)]
        assert backend.put([item(key, key.encode()) for key in keys]) == [True] * 30
        assert [read(backend, key) for key in keys] == [key.encode() for key in keys]
        assert backend.delete(keys) == 30
        backend.close(1)


def test_a_node_of_a_cluster_dies_and_returns() -> None:
    with Cluster() as cluster:
        backend = opened(cluster.url(parameters="timeout=1&connect_timeout=1"))
        keys = [f"k{i}" for i in range(30)]
        backend.put([item(key, key.encode()) for key in keys])
        cluster.servers[2].stop(signal.SIGKILL)
        gone = [key for key in keys if slot_of(key) >= 10_922]
        assert 0 < len(gone) < 30
        with pytest.raises(BackendUnavailable, match=str(cluster.servers[2].port)):
            backend.contains(keys)
        for key in keys:
            if key not in gone:
                assert read(backend, key) == key.encode()
        cluster.servers[2].start()
        wait_until(lambda: works(backend, gone), "it does not work again")
        assert backend.put([item(key, key.encode()) for key in gone]) == [True] * len(gone)
        backend.close(1)


def works(backend: RedisBackend, keys: list[str]) -> bool:
    try:
        return len(backend.contains(keys)) == len(keys)
    except BackendUnavailable:
        return False


# Through a store


def cached(url: str) -> LocalCache:
    return LocalCache(Store([Tier("remote", opened(url))], pool_bytes=1 << 20), namespace(), PRODUCER)


def test_bit_rot_is_a_miss_and_counted(redis_server: Server) -> None:
    redis_server.flush()
    tokens = tokens_of(1, 5 * CHUNK + 3)
    writer, engine = cached(redis_server.url()), PagedEngine()
    connector = engine.connect(writer)
    chain = store(writer, engine, connector, tokens)
    connector.close()
    writer.close()
    with redis_server.client() as client:
        keys = client.keys("*")
        assert len(keys) >= 5
        for key in keys:
            data = bytearray(client.get(key))
            data[-1] ^= 1
            client.set(key, bytes(data))
    reader = cached(redis_server.url())
    connector = engine.connect(reader)
    before = engine.rows(slots_of(2, len(tokens)))
    chunks, _ = load(reader, connector, tokens, slots_of(2, len(tokens)), "rotten")
    assert chunks == 0
    assert np.array_equal(engine.rows(slots_of(2, len(tokens))), before)
    counters = reader.stats().counters
    assert sum(n for name, n in counters.items() if name.startswith("lmcache_record_fail")) >= 1, counters
    connector.close()
    reader.close()
    assert chain


def test_two_stores_on_one_server(redis_server: Server) -> None:
    redis_server.flush()
    tokens = tokens_of(2, 5 * CHUNK + 3)
    first, second, engine, other = cached(redis_server.url()), cached(redis_server.url()), PagedEngine(), PagedEngine()
    writing, reading = engine.connect(first), other.connect(second)
    chain = store(first, engine, writing, tokens)
    rows = engine.rows(slots_of(1, len(chain) * CHUNK))
    writing.close()
    first.close()
    slots = slots_of(2, len(tokens))
    chunks, _ = load(second, reading, tokens, slots, "other")
    assert chunks == len(chain)
    assert np.array_equal(other.rows(slots[: len(chain) * CHUNK]), rows)
    reading.close()
    second.close()


# Bad input


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("redis://", "names no host"),
        ("redis:///0", "names no host"),
        ("redis://host:port", "port"),
        ("redis://host:0", "port 0 .*leave it out for 6379"),
        ("redis+cluster://:geheim@host,other:6379", "'host,other' in .* is neither"),
        ("redis://a..b", "'a..b' in .* is neither"),
        ("redis://ho st", "'ho st' in .* is neither"),
        ("redis://[::1:6379", "is not a URL"),
        ("redis://:geheim@h\u2100st", "is not a URL"),
        ("redis://host/db1", "'db1'"),
        ("redis://host/-1", "'-1'"),
        ("redis://host?tll=7d", "'tll'"),
        ("redis://host?ttl=soon", "ttl='soon'"),
        ("redis://host?ttl=-1", "ttl='-1'"),
        ("redis://host?ttl=0.0001s", "at least 0.001s"),
        ("redis://host?connections=0", "'0'"),
        ("redis://host?connections=many", "'many'"),
        ("redis://host?timeout=0", "timeout must be"),
        ("redis://host?connect_timeout=nan", "connect_timeout='nan'"),
        ("redis://host?ca=/ca.pem", "'ca'"),  # not without TLS
        ("redis://user@host", "password_file"),
        ("redis://:geheim@host?password_file=/x", "one of them"),
        ("redis://host?password_file=/no/such/file", "No such file"),
        ("rediss://host?ca=/no/such/file", "ca=/no/such/file"),
        ("rediss://host?verify=maybe", "'maybe'"),
        ("rediss://host?key=/x", "needs cert"),
        ("redis+unix://host/run/redis.sock", "three slashes|path of a socket"),
        ("redis+unix://", "path of a socket"),
        ("redis+cluster://host/1", "database 0"),
    ],
)
def test_bad_urls(url: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        open_backend(url)
    assert "geheim" not in str(caught.value)


def test_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("nothing")
    with pytest.raises(ConfigError, match="PEM"):
        open_backend(f"rediss://host?ca={tmp_path / 'ca'}")


def refused(url: str, named: str) -> None:
    with pytest.raises(BackendUnavailable, match=named) as caught:
        open_backend(
            f"{url}&connect_timeout=0.5&timeout=0.5" if "?" in url else f"{url}?connect_timeout=0.5&timeout=0.5"
        )
    text = "".join(traceback.format_exception(caught.value))
    assert "geheim" not in text.replace(url, "")


def test_what_cannot_be_connected_to(
    redis_server: Server, tls_server: Server, locked_server: Server, cluster: Cluster, certificates: Certificates
) -> None:
    plain, tls, locked = redis_server.port, tls_server.port, locked_server.port
    ca = f"?ca={certificates.ca}"
    refused(f"redis://127.0.0.1:{free_port()}", "nothing listens")
    refused("redis://no-such-host.invalid", "no host 'no-such-host.invalid'")
    refused("redis+unix:///no/such/socket", "no such socket")
    refused(f"redis://127.0.0.1:{locked}", "needs a password")
    refused(f"redis://:geheim@127.0.0.1:{locked}", "rejects this user name or password")
    refused(f"redis://nobody:geheim@127.0.0.1:{locked}", "rejects this user name or password")
    refused(f"redis://:geheim@127.0.0.1:{plain}", "has no password, but one was given")
    refused(f"redis://127.0.0.1:{plain}/99", "no database 99")
    refused(f"redis://127.0.0.1:{tls}", "rediss://")
    refused(f"rediss://127.0.0.1:{plain}", "redis://")
    refused(f"rediss://127.0.0.1:{tls}", "not trusted .* ca=FILE")
    refused(f"rediss://127.0.0.1:{tls}?ca={certificates.other_ca}", "not trusted .* ca=FILE")
    refused(f"rediss://localhost:{tls}{ca}", "another name")
    refused(f"redis+cluster://127.0.0.1:{plain}", "no node of a cluster")
    refused(f"redis+cluster://127.0.0.1:{free_port()}", "nothing listens")
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        refused(f"redis://127.0.0.1:{deaf.getsockname()[1]}", "did not answer within 0.5 s")
    with socket.create_server(("127.0.0.1", 0)) as web, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            with web.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        answering = pool.submit(answer)
        refused(f"redis://127.0.0.1:{web.getsockname()[1]}", "does not talk as Redis does; is the port right")
        answering.result(30)
    single = opened(f"redis://127.0.0.1:{cluster.port}")
    with pytest.raises(BackendUnavailable, match=r"redis\+cluster://"):
        single.contains([f"k{i}" for i in range(10)])
    single.close(1)
    without_check = opened(f"rediss://localhost:{tls}?verify=no")
    assert without_check.contains(["absent"]) == [False]
    without_check.close(1)


def test_a_certificate_of_the_client(certificates: Certificates) -> None:
    with Server({"tls-auth-clients": "yes"}, tls=certificates) as server:
        refused(f"rediss://127.0.0.1:{server.port}?ca={certificates.ca}", "cert=FILE")
        pair = f"cert={certificates.client_cert}&key={certificates.client_key}"
        backend = opened(f"valkeys://127.0.0.1:{server.port}?ca={certificates.ca}&{pair}")
        assert backend.put([item("k", b"1")]) == [True]
        backend.close(1)
        with pytest.raises(ConfigError, match="fit together"):
            open_backend(f"rediss://127.0.0.1?cert={certificates.client_cert}&key={certificates.key}")


def test_a_password_from_a_file(locked_server: Server, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("admin\n")
    backend = opened(f"redis://127.0.0.1:{locked_server.port}?password_file={tmp_path / 'password'}")
    assert backend.contains(["absent"]) == [False]
    backend.close(1)


def test_the_rights_that_the_documentation_names(cluster: Cluster, valkey_server: Server) -> None:
    cluster.flush()
    valkey_server.flush()
    servers = [(server, "+cluster|slots", "+asking") for server in cluster.servers]
    for server, *more in [*servers, (valkey_server, "+select")]:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "kv", "reset", "on", ">pw", "~*", *COMMANDS.split(), *more)
    for url in (
        f"redis+cluster://kv:pw@127.0.0.1:{cluster.port}",
        valkey_server.url("valkey", login="kv:pw@").replace("/0?", "/1?"),
    ):
        backend = opened(url)
        keys = [f"k{i}" for i in range(20)]
        assert backend.put([item(key, b"1") for key in keys]) == [True] * 20
        backend.touch(keys)
        assert sorted(stat.key for stat in backend.scan()) == sorted(keys)
        assert backend.usage().records == 20
        assert backend.delete(keys) == 20
        backend.close(1)


def test_a_user_who_may_too_little(locked_server: Server) -> None:
    with locked_server.client() as client:
        client.execute_command("ACL", "SETUSER", "reader", "reset", "on", ">pw", "~*", "+get", "+exists", "+ping")
        backend = opened(locked_server.url(login="reader:pw@"))
        assert read(backend, "absent") is Miss.ABSENT
        with pytest.raises(BackendUnavailable, match=r"does not permit.*'set'.*docs/redis\.md"):
            backend.put([item("k", b"1")])
        assert read(backend, "absent") is Miss.ABSENT
        backend.close(1)


def test_a_replica(redis_server: Server) -> None:
    with Server({"replicaof": f"127.0.0.1 {redis_server.port}"}) as replica:
        backend = opened(replica.url())
        with pytest.raises(BackendUnavailable, match="replica"):
            backend.put([item("k", b"1")])
        backend.close(1)


# Servers that say what they should not


class Peer:
    """Answers every command in the same way, as many of them as have come at once; GET in a way of its own."""

    def __init__(self, said: bytes, to_get: list[bytes] | None = None) -> None:
        self._said = said
        self._to_get = to_get
        self.connections = 0

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *exit_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        talks = []
        with contextlib.suppress(OSError):
            while True:
                peer = self._listener.accept()[0]
                self.connections += 1
                talks.append(threading.Thread(target=self._talk, args=(peer,)))
                talks[-1].start()
        for talk in talks:
            talk.join(10)

    def _talk(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            while data := peer.recv(1 << 16):
                for part in (self._to_get or []) if b"GET" in data else [self._said]:
                    peer.sendall(part)


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"$-1\r\n" * 9,
        b"*1\r\n" * 10_000,
        b"$999999999999\r\n",
        b"$5\r\nhello, world\r\n",
        b"*999999999999\r\n",
        b":x\r\n",
        b"+" + b"y" * 200_000,
        b"-ERR unknown command 'AUTH', with args beginning with: 'geheim'\r\n",
        b"\r\n",
    ],
)
def test_what_is_no_redis(said: bytes) -> None:
    """Whatever it says instead of an answer, there is an error, in time."""
    with Peer(said) as peer:
        refused(f"redis://:geheim@127.0.0.1:{peer.port}", "127.0.0.1")


@pytest.mark.parametrize("to_get", [[b"$1\r\nA\r\n$1\r\nB\r\n"], [b"$1\r\nA\r\n", b"$1\r\nB\r\n"]])
def test_a_reply_too_many_is_nobodys(to_get: list[bytes]) -> None:
    """Come together with the right one, or after it."""
    with Peer(b"+OK\r\n", to_get) as peer:
        backend = opened(f"redis://127.0.0.1:{peer.port}")
        for number in range(1, 6):
            assert read(backend, f"k{number}") == b"A"
            assert peer.connections == number
            wait_until(lambda: all(link.stale for link in backend._servers.nodes()[0]._free), "the second half")
        backend.close(1)


@pytest.mark.parametrize("to_get", [b"$3\r\nabcde\r\n", b"$3\r\nabc\n\r", b"+abc\r\n", b"*0\r\n", b"$\r\n", b"$-2\r\n"])
def test_a_value_that_is_none(to_get: bytes) -> None:
    with Peer(b"+OK\r\n", [to_get]) as peer:
        backend = opened(f"redis://127.0.0.1:{peer.port}")
        with pytest.raises(BackendUnavailable, match="does not talk as Redis does"):
            read(backend, "k")
        backend.close(1)


@pytest.mark.parametrize("said", [b"+OK\r\n", b":1\r\n:1\r\n:1\r\n", b"$1\r\n1\r\n", b":\r\n", b":-x\r\n"])
def test_counts_that_are_none(said: bytes) -> None:
    with Peer(b"+OK\r\n") as peer:
        backend = opened(f"redis://127.0.0.1:{peer.port}")
        peer._said = said
        with pytest.raises(BackendUnavailable, match="does not talk as Redis does"):
            backend.contains(["a", "b"])
        backend.close(1)
