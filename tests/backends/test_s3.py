"""``s3://`` on SeaweedFS, which checks signatures as S3 does."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import obstore
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import S3Store

from lmcache_backends.s3 import S3Backend
from lmcache_backends.s3.names import folder_of, key_of, name_of
from lmcache_sdk.backend import KEY_LIMIT, Miss, Range, RangeGet, Url, open_backend
from lmcache_sdk.cli.live import LiveStore
from lmcache_sdk.errors import BackendUnavailable, ConfigError
from lmcache_sdk.open import LocalCache
from lmcache_sdk.store import Store, Tier
from lmcache_sdk.testing.backends import BackendTests, backend_state_machine, item, read, some_bytes
from lmcache_sdk.testing.proxy import Proxy
from tests.backends.fault_tests import RemoteFaultTests
from tests.backends.redis_server import Certificates
from tests.backends.seaweed import PROFILES, SeaweedFS, serving, without_settings
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of


class S3Tests(BackendTests):
    durable = True
    seaweed: ClassVar[SeaweedFS]

    def open(self, place: Path) -> S3Backend:
        return S3Backend.from_url(Url(self.seaweed.url(prefix=self.prefix(place))))

    def prefix(self, place: Path) -> str:
        return f"suite/{uuid.uuid5(uuid.NAMESPACE_URL, str(place))}"

    def raw(self, backend: S3Backend) -> S3Store:
        return self.seaweed.client(backend._store.prefix)

    def raw_get(self, backend: S3Backend, key: str) -> bytes | None:  # type: ignore[override]
        try:
            return bytes(obstore.get(self.raw(backend), name_of(key)).bytes())
        except FileNotFoundError:
            return None

    def raw_set(self, backend: S3Backend, key: str, data: bytes) -> None:  # type: ignore[override]
        obstore.put(self.raw(backend), name_of(key), data, use_multipart=False)


@pytest.fixture(scope="module", autouse=True)
def _(seaweed: SeaweedFS) -> None:
    S3Tests.seaweed = seaweed


class TestS3(S3Tests):
    pass


TestS3Randomly = backend_state_machine(S3Tests()).TestCase
TestS3Randomly.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture
def backend(seaweed: SeaweedFS) -> Iterator[S3Backend]:
    backend = S3Backend.from_url(Url(seaweed.url()))
    yield backend
    backend.close(10)


def open_at(url: str) -> S3Backend:
    backend = open_backend(url)
    assert isinstance(backend, S3Backend)
    return backend


class TestNames:
    keys = st.text("aZ0._/-", min_size=1, max_size=KEY_LIMIT) | st.sampled_from(
        [part * count for part in ("k", "k/", "../", "/", ".", "-") for count in (1, 2, 199, 200)]
    )

    @given(keys, keys)
    def test_a_name_is_the_keys_alone_and_no_other_ones_folder(self, one: str, other: str) -> None:
        assert key_of(name_of(one)) == one
        assert (name_of(one) == name_of(other)) == (one == other)
        assert not name_of(one).startswith(name_of(other) + "/")
        for segment in name_of(one).split("/"):
            assert 0 < len(segment) <= 255
            assert segment not in (".", "..")

    @given(keys, st.integers(0, KEY_LIMIT))
    def test_the_folder_of_a_prefix_has_the_key(self, key: str, length: int) -> None:
        folder = folder_of(key[:length])
        assert not folder or name_of(key).startswith(folder + "/")

    @pytest.mark.parametrize("name", ["somebody's", "a/b", "a/", "a//b!", "../a!", "!!a!", "a!b!", "photos/In Rome!"])
    def test_what_others_put_there_is_no_key(self, name: str) -> None:
        assert key_of(name) is None


class TestObjects:
    def test_what_exists_is_not_uploaded_again(self, seaweed: SeaweedFS) -> None:
        with Proxy("127.0.0.1", seaweed.port) as proxy:
            backend = open_at(seaweed.url(endpoint=f"http://127.0.0.1:{proxy.port}"))
            data = some_bytes(1 << 20)
            assert backend.put([item("k", data)]) == [True]
            sent = proxy.bytes_up
            assert sent > len(data)
            assert backend.put([item("k", data)]) == [False]
            assert proxy.bytes_up < sent + 10_000
            backend.close(5)

    def test_a_faster_writer_is_not_overwritten(self, backend: S3Backend, seaweed: SeaweedFS) -> None:
        """Between the question whether it is there, and the upload."""
        backend._has = lambda name: False  # type: ignore[method-assign]
        raw = seaweed.client(backend._store.prefix)
        obstore.put(raw, name_of("k"), b"theirs")
        assert backend.put([item("k", b"ours")]) == [False]
        assert read(backend, "k") == b"theirs"

    def test_long_ranges(self, backend: S3Backend, seaweed: SeaweedFS) -> None:
        """Which are asked for in pieces, side by side."""
        data = some_bytes(13 << 20)
        backend.put([item("k", data)])
        memory = memoryview(bytearray(b"\xa5" * (15 << 20)))
        sizes = [1, 5 << 20, 3 << 20, 300, 2 << 20, (4 << 20) - 1, 100]
        cuts = np.cumsum([0, *sizes]).tolist()
        buffers = [memory[start:end] for start, end in pairwise(cuts)]
        assert backend.get_ranges([Range("k", 1000, buffers[:-2])]) == [sum(sizes[:-2])]
        assert memory[: cuts[-3]] == data[1000 : 1000 + cuts[-3]]
        assert set(memory[cuts[-3] :]) == {0xA5}
        assert backend.get_ranges([Range("k", 1000, buffers), Range("absent", 0, buffers)]) == [
            len(data) - 1000,
            Miss.ABSENT,
        ]
        assert memory[: len(data) - 1000] == data[1000:]
        assert set(memory[len(data) - 1000 :]) == {0xA5}

    def test_scan_tells_when_and_leaves_out_what_is_not_ours(self, backend: S3Backend, seaweed: SeaweedFS) -> None:
        backend.put([item("a/b", b"1"), item("a/../b", b"1"), item("a//", b"22")])
        raw = seaweed.client(backend._store.prefix)
        obstore.put(raw, "a/somebody's", b"1")
        found = {stat.key: stat for stat in backend.scan("a/")}
        assert found.keys() == {"a/b", "a/../b", "a//"}
        assert abs(found["a//"].modified - time.time()) < 60
        assert [stat.key for stat in backend.scan("a/.")] == ["a/../b"]

    def test_many(self, backend: S3Backend) -> None:
        """More than S3 lists or deletes by one request."""
        keys = [f"k/{number}" for number in range(1100)]
        assert backend.put([item(key, b"") for key in keys]) == [True] * 1100
        assert backend.prefix_len([*keys, "absent"]) == 1100
        assert {stat.key for stat in backend.scan()} == set(keys)
        assert backend.delete([*keys, "absent"]) == 1100
        assert list(backend.scan()) == []

    def test_a_long_queue_of_writes_ends_in_time(self, seaweed: SeaweedFS) -> None:
        """Some of it is not written; nothing is read from the caller's memory after the call."""
        with Proxy("127.0.0.1", seaweed.port) as proxy:
            url = seaweed.url(endpoint=f"http://127.0.0.1:{proxy.port}", connections=1, timeout=2)
            backend = open_at(url)
            proxy.latency(0.2)
            start = time.monotonic()
            with pytest.raises(BackendUnavailable, match="within 2 s"):
                backend.put([item(f"k{number}", b"1") for number in range(50)], if_absent=False)
            assert time.monotonic() - start < 2.5
            proxy.pass_through()
            backend.close(5)

    def test_what_comes_after_the_call_does_not_touch_its_buffers(self, seaweed: SeaweedFS) -> None:
        with Proxy("127.0.0.1", seaweed.port) as proxy:
            backend = open_at(seaweed.url(endpoint=f"http://127.0.0.1:{proxy.port}", connections=1))
            backend.put([item("k", some_bytes(5000))])
            backend._timeout_s = 0.2  # the client's own patience is longer
            proxy.latency(0.5)
            buffer = bytearray(b"\xa5" * 5000)
            calls: list[Callable[[], object]] = [
                lambda: backend.get(["k"], [memoryview(buffer)]),
                lambda: backend.get_ranges([Range("k", 10, [memoryview(buffer)])]),
            ]
            for call in calls:
                with pytest.raises(BackendUnavailable, match="no answer within"):
                    call()
                backend._reading.submit(int).result(10)  # the one thread is done with it
                assert set(buffer) == {0xA5}
            backend.close(5)

    def test_bit_rot_is_a_miss_and_a_counter(self, seaweed: SeaweedFS) -> None:
        prefix = uuid.uuid4().hex
        tokens = tokens_of(0, 5 * CHUNK)

        def open_cache() -> LocalCache:
            tier = Tier("s3", open_at(seaweed.url(prefix)))
            return LocalCache(Store([tier], pool_bytes=1 << 20), namespace(), PRODUCER)

        cache, engine = open_cache(), PagedEngine()
        connector = engine.connect(cache)
        chain = store(cache, engine, connector, tokens)
        rows = engine.rows(slots_of(1, len(tokens)))
        connector.close()
        cache.close()

        raw = seaweed.client(prefix)
        (name,) = (
            entry["path"] for page in obstore.list(raw) for entry in page if chain.digests()[3].hex() in entry["path"]
        )
        data = bytearray(obstore.get(raw, name).bytes())
        data[len(data) // 2] ^= 4
        obstore.put(raw, name, bytes(data))

        cache, target = open_cache(), PagedEngine()
        connector = target.connect(cache)
        slots = slots_of(2, len(tokens))
        chunks, _ = load(cache, connector, tokens, slots)
        assert chunks == 3
        assert np.array_equal(target.rows(slots[: 3 * CHUNK]), rows[:, : 3 * CHUNK])
        assert cache.stats().counters['lmcache_record_failures_total{tier="s3",reason="payload"}'] == 1
        with pytest.raises(FileNotFoundError):
            obstore.head(raw, name)
        connector.close()
        cache.close()

    def test_a_check_reads_ranges_as_well(self, seaweed: SeaweedFS) -> None:
        with LiveStore(seaweed.url()) as live, live.opened("x") as part:
            assert isinstance(part, RangeGet)

    def test_the_bucket_in_the_hosts_name(self, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which no name server here knows: the server is its own proxy."""
        monkeypatch.setenv("http_proxy", seaweed.endpoint)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("NO_PROXY", "")
        prefix = uuid.uuid4().hex
        backend = open_at(seaweed.url(prefix, endpoint=f"http://localhost:{seaweed.port}", style="virtual"))
        assert backend._store.config["endpoint"].startswith(f"http://{seaweed.bucket}.localhost:")
        assert backend.put([item("k", b"1")]) == [True]
        assert read(backend, "k") == b"1"
        backend.close(5)
        assert bytes(obstore.get(seaweed.client(prefix), name_of("k")).bytes()) == b"1"


class TestFaults(RemoteFaultTests):
    timeout_s = 4.0  # a request has a quarter of it

    seaweed: ClassVar[SeaweedFS]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        """One of its own: it is killed."""
        with serving(tmp_path_factory.mktemp("seaweed")) as server:
            cls.seaweed = server
            yield

    def target(self) -> tuple[str, int]:
        return "127.0.0.1", self.seaweed.port

    def open(self, port: int) -> S3Backend:
        return open_at(self.seaweed.url("faults", endpoint=f"http://127.0.0.1:{port}", timeout=self.timeout_s))

    def kill_server(self) -> None:
        self.seaweed.kill()

    def start_server(self) -> None:
        self.seaweed.start()


class TestBadInput:
    """At opening: what is wrong, how to put it right, and no secret."""

    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("s3://", "'' in 's3://' is no bucket"),
            ("s3://bucket:9000/x", "as ?endpoint="),
            ("s3://key:some-secret@bucket/x", "AWS_ACCESS_KEY_ID"),
            ("s3://bucket/a/../b", "prefix"),
            ("s3://bucket/a//b", "prefix"),
            ("s3://bucket?endpoint=example.com:9000", "https://s3.example.com:9000"),
            ("s3://bucket?endpoint=ftp://example.com", "https://s3.example.com:9000"),
            ("s3://bucket?endpoint=http://user:some-secret@example.com", "https://s3.example.com:9000"),
            ("s3://bucket?regoin=x", "unknown parameter 'regoin'"),
            ("s3://bucket?secret_access_key=some-secret", "unknown parameter 'secret_access_key'"),
            ("s3://bucket?style=vhost", "path or virtual, got 'vhost'"),
            ("s3://bucket?connections=many", "connections is a whole number from 1 to 9999, got 'many'"),
            ("s3://bucket?connections=0", "connections"),
            ("s3://bucket?timeout=-1", "timeout"),
            ("s3://bucket?timeout=nan", "timeout"),
            ("s3://bucket?ca=/no/such.pem", "/no/such.pem"),
            (f"s3://bucket?ca={__file__}", "holds no certificates in PEM form"),
            ("s3://bucket?endpoint=http://127.0.0.1:99999", "https://s3.example.com:9000"),
            ("s3://bucket?endpoint=http://127.0.0.1:9000x", "https://s3.example.com:9000"),
            ("s3://bucket?endpoint=http://127.0.0.1:9000&style=virtual", "use path"),
            ("s3://bucket?profile=nobody", "has no profile 'nobody'"),
            ("s3://bucket?profile=role", "export its credentials"),
        ],
    )  # fmt: skip
    def test_a_url(self, url: str, told: str) -> None:
        with pytest.raises(ConfigError) as caught:
            open_backend(url)
        assert told in str(caught.value)
        assert "some-secret" not in str(caught.value)

    def refused(self, url: str) -> str:
        start = time.monotonic()
        with pytest.raises(BackendUnavailable) as caught:
            open_backend(url)
        assert time.monotonic() - start < 6
        message = str(caught.value)
        assert "\n" not in message
        assert not any(secret in message for _, secret in PROFILES.values())
        return message

    @pytest.mark.parametrize(
        ("profile", "told"),
        [
            ("wrong-secret", "the secret key is wrong"),
            ("unknown", "the access key is not known there"),
            ("expired", "AWS_SESSION_TOKEN|the access key is not known there"),
        ],
    )
    def test_credentials(self, seaweed: SeaweedFS, profile: str, told: str) -> None:
        message = self.refused(seaweed.url(profile=profile))
        assert any(one in message for one in told.split("|"))

    def test_no_credentials(self, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
        without_settings(monkeypatch)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/no/such/file")
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")  # no cloud's machine
        assert "no credentials" in self.refused(seaweed.url(timeout=4))

    def test_a_bucket(self, seaweed: SeaweedFS) -> None:
        assert "no such bucket" in self.refused(seaweed.url().replace(seaweed.bucket, "no-such-bucket"))

    def test_a_bucket_that_goes(self, backend: S3Backend) -> None:
        backend._store = S3Store(
            "no-such-bucket", endpoint=backend._store.config["endpoint"], client_options={"allow_http": True},
            credential_provider=backend._store.credential_provider,
        )  # fmt: skip
        with pytest.raises(BackendUnavailable, match="no such bucket"):
            read(backend, "k")

    def test_a_read_only_bucket(self, seaweed: SeaweedFS) -> None:
        prefix = uuid.uuid4().hex
        writer, reader = open_at(seaweed.url(prefix)), open_at(seaweed.url(prefix, profile="reader"))
        writer.put([item("k", b"1")])
        assert read(reader, "k") == b"1"
        for write in (lambda: reader.put([item("new", b"1")]), lambda: reader.delete(["k"])):
            with pytest.raises(BackendUnavailable, match="s3:PutObject"):
                write()
        writer.close(5)
        reader.close(5)

    def test_credentials_of_the_environment(self, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", PROFILES["default"][0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PROFILES["wrong-secret"][1])
        assert "the secret key is wrong" in self.refused(seaweed.url())
        open_at(seaweed.url(profile="default")).close(5)  # which the URL says
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PROFILES["default"][1])
        open_at(seaweed.url()).close(5)

    def test_an_endpoint_of_the_environment(self, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
        open_at(f"s3://{seaweed.bucket}/x").close(5)

    def test_hosts(self, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "nothing listens" in self.refused(seaweed.url(endpoint="http://127.0.0.1:1", timeout=4))
        assert "resolved" in self.refused(seaweed.url(endpoint="http://no-such-host.invalid", timeout=4))
        assert "TLS" in self.refused(seaweed.url(endpoint=f"https://127.0.0.1:{seaweed.port}", timeout=4))

    @pytest.mark.parametrize(
        ("status", "answer", "told"),
        [
            (200, "<html>", "no S3 server, it seems"),
            (404, "<html>", "no S3 server, it seems"),
            (301, "<Error><Code>PermanentRedirect</Code></Error>", "region"),
            (400, "<Error><Code>AuthorizationHeaderMalformed</Code></Error>", "region"),
            (400, "<Error><Code>ExpiredToken</Code></Error>", "expired"),
            (403, "<Error><Code>RequestTimeTooSkewed</Code></Error>", "clock"),
            (403, "<Error><Code>AccessDenied</Code></Error>", "s3:ListBucket"),
            (503, "<Error><Code>SlowDown</Code></Error>", "?connections="),
            (500, "<Error><Code>InternalError</Code></Error>", "500"),
        ],
    )
    def test_answers_of_other_servers(self, seaweed: SeaweedFS, status: int, answer: str, told: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *arguments: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                message = self.refused(seaweed.url(endpoint=f"http://127.0.0.1:{server.server_port}", timeout=2))
            finally:
                server.shutdown()
                thread.join()
        assert told in message

    def test_tls(self, seaweed: SeaweedFS, certificates: Certificates) -> None:
        endpoint = f"https://127.0.0.1:{seaweed.tls_port}"
        assert "not trusted" in self.refused(seaweed.url(endpoint=endpoint, timeout=4))
        assert "not trusted" in self.refused(seaweed.url(endpoint=endpoint, ca=certificates.other_ca, timeout=4))
        backend = open_at(seaweed.url(endpoint=endpoint, ca=certificates.ca))
        assert backend.put([item("k", b"1")]) == [True]
        assert read(backend, "k") == b"1"
        backend.close(5)
