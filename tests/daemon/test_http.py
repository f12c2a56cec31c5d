"""``/metrics``, ``/healthz``, the metrics themselves and their page, and logs."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import lmcache_sdk.daemon.http
from lmcache_sdk import ConfigError, core, open_cache
from lmcache_sdk.config import Config
from lmcache_sdk.daemon.http import MetricsServer
from lmcache_sdk.errors import BackendUnavailable
from lmcache_sdk.keys import Chain
from lmcache_sdk.observe.logs import log_to_stderr, logger, masked
from lmcache_sdk.observe.metrics import TOTALS, Metrics
from tests.core.engine import CHUNK, PRODUCER, PagedEngine, load, namespace, slots_of, store, tokens_of
from tests.core.served import Served, command, free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
Samples = dict[str, dict[tuple[str, ...], float]]


@pytest.fixture
def served() -> Iterator[Served]:
    place = Served()
    yield place
    place.close()


def get(
    port: int, path: str = "/metrics", headers: dict[str, str] | None = None, tls: Path | None = None
) -> tuple[int, str]:
    if tls is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    else:
        context = ssl.create_default_context(cafile=str(tls))
        connection = http.client.HTTPSConnection("localhost", port, timeout=10, context=context)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def scrape(port: int) -> Samples:
    """Metric -> values of its labels -> number."""
    status, text = get(port)
    assert status == 200
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


# The endpoints


def test_what_is_looked_up_adds_up(served: Served) -> None:
    """Tokens by where they were found = tokens looked up; pool memory by state = the pool."""
    port, looked_up = free_port(), 0
    served.start("--tier", "memory://", "--metrics-port", port)
    cache = open_cache(served.url, namespace=namespace(), producer=PRODUCER)
    # The first is longer than what a client sends at once: the daemon gets its digests in several messages.
    long, short = tokens_of(1, 40 * CHUNK), tokens_of(2, 3 * CHUNK)
    for tokens in (long, short):
        reservation = cache.reserve("store", Chain(tokens, CHUNK), 0, len(tokens) // CHUNK)
        assert reservation is not None
        cache.publish(reservation)
    assert cache.drain(10)
    cache.delete(Chain(short, CHUNK))
    assert cache.drain(10)
    longer, unknown = np.concatenate([long, tokens_of(4, 200 * CHUNK)]), tokens_of(3, 100 * CHUNK + 1)
    for number, tokens in enumerate([long, long[: 2 * CHUNK], short, unknown, longer]):
        rid = f"load {number}"
        cache.lookup(rid, Chain(tokens, CHUNK))
        lookup = cache.wait(rid, 10)
        ticket = cache.claim(rid, lookup.chunks)
        if ticket is not None:
            cache.release(ticket)
        cache.forget(rid)
        looked_up += len(tokens) // CHUNK * CHUNK
    found = scrape(port)
    assert sum(found["lmcache_lookup_tokens_total"].values()) == looked_up
    assert found["lmcache_lookup_tokens_total"]["pool",] == (40 + 2 + 40) * CHUNK
    assert found["lmcache_lookups_total"] == {("hit",): 3, ("miss",): 2}
    assert found["lmcache_lookup_seconds_count"][()] == 5
    assert sum(found["lmcache_pool_bytes"].values()) == 8 << 20
    assert found["lmcache_removed_chunks_total"] == {("deleted",): 3}
    assert found["lmcache_residence_seconds_count"]["deleted",] == 3
    assert found["lmcache_stored_chunks_total"][()] == 43
    assert found["lmcache_written_chunks_total"]["memory",] == 43
    assert found["lmcache_leased_bytes_total"][()] / found["lmcache_stored_bytes_total"][()] == 82 / 43
    assert found["lmcache_tier_bytes_total"]["write", "memory"] > 0  # in the order of the names
    assert found["lmcache_tier_breaker_open"] == {("memory",): 0}
    assert found["lmcache_clients"][()] == 1
    assert not [name for name in found if name.endswith("_created")]
    cache.close()


def test_tokens_from_a_tier_are_counted_as_its(served: Served) -> None:
    port, url = free_port(), f"lmdb://{served.folder}/store?size=64MiB"
    arguments = ("--tier", url, "--metrics-port", port, "--no-keep-pool")
    served.start(*arguments)
    tokens = tokens_of(1, 5 * CHUNK)
    for wanted in ("none", "lmdb"):
        if wanted == "lmdb":
            assert served.stop() == 0
            served.start(*arguments)
        cache, engine = open_cache(served.url, namespace=namespace(), producer=PRODUCER), PagedEngine()
        connector = engine.connect(cache)
        load(cache, connector, tokens, slots_of(2, len(tokens)))
        found = {source: count for (source,), count in scrape(port)["lmcache_lookup_tokens_total"].items() if count}
        assert found == {wanted: 5 * CHUNK}
        store(cache, engine, connector, tokens)
        connector.close()
        cache.close()


def test_healthz(served: Served) -> None:
    port = free_port()
    served.start("--metrics-port", port)
    assert get(port, "/healthz") == (200, "ok\n")
    assert get(port, "/")[0] == get(port, "/metrics/../etc/passwd")[0] == 404


def test_a_port_in_use_is_told_before_anything_else(served: Served) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("serve", "--socket", served.socket, "--metrics-port", port)
    assert done.returncode == 1
    assert f"cannot serve metrics on 127.0.0.1 port {port} (Address already in use); choose another" in done.stderr
    assert not served.pool.exists() and not served.socket.exists()


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MetricsServer]:
    settings = dict(getattr(request, "param", {}))
    if "metrics_token_file" in settings:
        settings["metrics_token_file"] = str(tmp_path / "token")
        (tmp_path / "token").write_text("right")
        (tmp_path / "token").chmod(0o600)
    running = MetricsServer(Config(metrics_port=free_port(), **settings))
    yield running
    running.close()


def port_of(server: MetricsServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_a_daemon_that_does_not_answer_is_unhealthy(server: MetricsServer) -> None:
    server.start(bytes, lambda: False)
    assert get(port_of(server), "/healthz")[0] == 503


def test_connections_that_say_nothing_stand_in_nobodys_way(server: MetricsServer) -> None:
    server.start(lambda: b"x 1\n", lambda: True)
    before = threading.active_count()
    silent = []
    for _ in range(40):
        silent.append(socket.create_connection(("127.0.0.1", port_of(server))))
        assert get(port_of(server)) == (200, "x 1\n")
        assert threading.active_count() <= before + 20, "there is a bound"
    for connection in silent:
        connection.close()


@pytest.mark.parametrize("server", [{"metrics_token_file": "token"}], indirect=True)
def test_requests_that_may_not_be_asked_stand_in_nobodys_way(server: MetricsServer) -> None:
    server.start(lambda: b"x 1\n", lambda: True)
    begun = []
    for _ in range(40):
        begun.append(socket.create_connection(("127.0.0.1", port_of(server))))
        begun[-1].sendall(b"GET /metrics HTTP/1.1\r\nAuthorization: Bearer wrong\r\n")
    assert get(port_of(server), headers={"Authorization": "Bearer right"}) == (200, "x 1\n")
    assert get(port_of(server))[0] == 401
    for connection in begun:
        connection.close()


def test_a_request_that_drips_in_is_cut_off(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_sdk.daemon.http, "_REQUEST_S", 0.4)
    server.start(lambda: b"x 1\n", lambda: True)
    started, pause = time.monotonic(), threading.Event()
    with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 10:
                connection.sendall(b"X: y\r\n")
                pause.wait(0.05)
    assert time.monotonic() - started < 5


def test_a_long_answer_is_not_cut_off(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmcache_sdk.daemon.http, "_REQUEST_S", 0.2)

    def metrics() -> bytes:
        threading.Event().wait(1.5)
        return b"x 1\n"

    server.start(metrics, lambda: True)
    assert get(port_of(server)) == (200, "x 1\n")


def test_head_tells_the_same_without_the_body(server: MetricsServer) -> None:
    server.start(lambda: b"x 1\n", lambda: True)
    for path in ("/metrics", "/healthz"):
        connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=10)
        connection.request("HEAD", path)
        response = connection.getresponse()
        assert response.status == 200 and int(response.headers["Content-Length"]) > 2 and response.read() == b""
        connection.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Signed by itself, for localhost: PEM files of it and of its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_others_need_token_and_tls(served: Served, certificate: tuple[Path, Path], tmp_path: Path) -> None:
    token, port = tmp_path / "token", free_port()
    token.write_text("correct horse\n")
    token.chmod(0o600)
    served.start(
        "--metrics-port", port, "--metrics-host", "0.0.0.0", "--metrics-token-file", token,
        "--metrics-cert", certificate[0], "--metrics-key", certificate[1],
    )  # fmt: skip
    for path in ("/metrics", "/healthz"):
        assert get(port, path, {"Authorization": "Bearer correct horse"}, certificate[0])[0] == 200
        assert get(port, path, {}, certificate[0])[0] == 401
        assert get(port, path, {"Authorization": "Bearer wrong"}, certificate[0])[0] == 401
        assert get(port, path, {"Authorization": "Basic correct horse"}, certificate[0])[0] == 401
    with pytest.raises((ConnectionError, http.client.HTTPException, TimeoutError)):
        get(port)  # without TLS
    assert "correct" not in served.log()


def test_a_handshake_that_does_not_come_stands_in_nobodys_way(certificate: tuple[Path, Path]) -> None:
    server = MetricsServer(
        Config(metrics_port=free_port(), metrics_cert=str(certificate[0]), metrics_key=str(certificate[1]))
    )
    server.start(lambda: b"x 1\n", lambda: True)
    with socket.create_connection(("127.0.0.1", port_of(server))):
        assert get(port_of(server), tls=certificate[0]) == (200, "x 1\n")
    server.close()


def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    wrong = str(empty)
    for settings, message in (
        ({"metrics_token_file": wrong}, "empty is empty; write a token into it"),
        ({"metrics_token_file": "/nowhere"}, "cannot read metrics_token_file /nowhere"),
        ({"metrics_cert": wrong, "metrics_key": wrong}, "are no certificate with its key"),
        ({"metrics_cert": str(certificate[0]), "metrics_key": "/nowhere"}, "cannot read /nowhere"),
        ({"metrics_host": "0.0.0.0"}, "need a token and TLS"),
        ({"metrics_host": "example.org"}, "need a token and TLS"),
    ):
        with pytest.raises(ConfigError, match=message):
            MetricsServer(Config(metrics_port=free_port(), **settings))


def test_a_port_in_use_is_refused_by_its_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.99.99.99", 0))
        taken.listen()
        config = Config(metrics_port=taken.getsockname()[1], metrics_host="127.99.99.99")
        with pytest.raises(BackendUnavailable, match=r"cannot serve metrics on 127\.99\.99\.99 port"):
            MetricsServer(config)


# The metrics


def test_the_page_names_every_metric_and_no_other() -> None:
    kinds = {"counter": "_total", "gauge": "", "histogram": ""}
    metrics = Metrics()
    real = {
        (family.name + kinds[family.type], family.type, tuple(getattr(metric, "_labelnames", ())))
        for metric in vars(metrics).values()
        if hasattr(metric, "collect") and metric is not metrics.registry
        for family in metric.collect()
    }
    real |= {(f"{total.metric}_total", "counter", (total.label,) if total.label else ()) for total in TOTALS.values()}
    rows = re.findall(r"^\| `(lmcache_\w+)` \| (\w+) \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(real)
    assert {(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows} == real


def test_all_that_the_core_counts_is_shown() -> None:
    sources = (path.read_text() for path in Path(core.__file__).parent.glob("*.py"))
    counted = {name for source in sources for name in re.findall(r"counters\[f?\"(\w+)", source)}
    assert counted == set(TOTALS)


def test_names_follow_the_conventions() -> None:
    for family in Metrics().registry.collect():
        assert family.name.startswith("lmcache_") and ":" not in family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        assert not family.name.endswith(("_ms", "_ratio", "_total"))


# Logs


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("INFO", "json")
    try:
        log = logger("test")
        log.info("opened %s", "redis://me:secret@host/0", extra={"url": "s3://b?secret_key=secret", "count": 3})
        try:
            raise ValueError("redis://me:secret@host")
        except ValueError:
            log.exception("failed")
    finally:
        log_to_stderr("WARNING", "text")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", first.pop("ts"))
    assert first == {
        "level": "INFO", "logger": "lmcache_sdk.test", "message": "opened redis://me:***@host/0",
        "url": "s3://b?secret_key=***", "count": 3,
    }  # fmt: skip
    assert second["level"] == "ERROR" and "ValueError" in second["exception"]
    assert "secret@" not in second["exception"]


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr("WARNING")
    logger("test").warning("no %s", "redis://me:secret@host/0?password=x&db=1")
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"[\d:]{8} WARNING lmcache_sdk\.test: no redis://me:\*\*\*@host/0\?password=\*\*\*&db=1\n", line
    )
    logging.getLogger("lmcache_sdk").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("lmdb:///a@b?size=1GiB", "lmdb:///a@b?size=1GiB"),
        ("at s3://key:word@b/p, later", "at s3://key:***@b/p, later"),
        ("at s3://key:w/or@d@b/p, later", "at s3://key:***@b/p, later"),
        ("a?access_key=1&region=x", "a?access_key=***&region=x"),
    ],
)
def test_what_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
