"""A real S3 server, with signatures checked: SeaweedFS."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import obstore
import pytest
from obstore.store import S3Store

from tests.backends.programs import program
from tests.backends.redis_server import Certificates

READY_S = 40.0

#: Profiles of the file of credentials: those that the server knows, and others.
PROFILES = {
    "default": ("some-key", "some-secret-of-the-owner"),
    "reader": ("reading-key", "some-secret-of-the-reader"),
    "wrong-secret": ("some-key", "another-secret"),
    "unknown": ("unknown-key", "a-secret-of-nobody"),
}
_KNOWN = {"default": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}


def free_ports(count: int) -> list[int]:
    """All different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class SeaweedFS:
    """One server, all of whose parts are in one process; its records outlast ``kill``.

    Args:
        folder: an empty one, for everything.
        certificates: to serve TLS as well, at ``tls_port``.
    """

    bucket = "kv-tests"
    region = "us-east-1"

    def __init__(self, folder: Path, certificates: Certificates | None = None) -> None:
        self.folder = folder
        self.credentials = folder / "credentials"
        self._write_credentials()
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, self.port, grpc, tls = free_ports(9)
        self.tls_port = tls if certificates else 0
        options = {
            "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1",
            "master.port": master, "master.port.grpc": master_grpc,
            "master.telemetry": "false", "master.volumeSizeLimitMB": 256, "master.electionTimeout": "1s",
            "volume.port": volume, "volume.port.grpc": volume_grpc, "volume.max": 40, "volume.preStopSeconds": 0,
            "filer": "true", "filer.port": filer, "filer.port.grpc": filer_grpc,
            "filer.localSocket": folder / "filer.sock",
            "s3": "true", "s3.port": self.port, "s3.port.grpc": grpc, "s3.config": folder / "identities.json",
            "s3.port.iceberg": 0, "s3.port.lance": 0, "s3.iam": "false", "s3.localSocket": folder / "s3.sock",
            "s3.domainName": "localhost",
        }  # fmt: skip
        if certificates:
            options |= {"s3.port.https": tls, "s3.cert.file": certificates.cert, "s3.key.file": certificates.key}
        self.line = [program("weed"), "server", *(f"-{name}={value}" for name, value in options.items())]
        self.process: subprocess.Popen[bytes] | None = None

    def _write_credentials(self) -> None:
        identities = [
            {"name": name, "credentials": [dict(zip(("accessKey", "secretKey"), PROFILES[name], strict=True))],
             "actions": actions}
            for name, actions in _KNOWN.items()
        ]  # fmt: skip
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}))
        parser = configparser.RawConfigParser()
        for name, (access_key, secret_key) in PROFILES.items():
            parser[name] = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key}
        parser["expired"] = {**parser["unknown"], "aws_session_token": "a-token-of-long-ago"}
        parser["role"] = {"role_arn": "arn:aws:iam::123456789012:role/someone", "source_profile": "default"}
        with self.credentials.open("w") as file:
            parser.write(file)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, prefix: str = "", **parameters: Any) -> str:
        """Of the bucket; without a prefix, of one of its own."""
        query = urlencode({"endpoint": self.endpoint, **parameters})
        return f"s3://{self.bucket}/{prefix or uuid.uuid4().hex}?{query}"

    def client(self, prefix: str = "", **settings: Any) -> S3Store:
        """The bucket by the client library alone."""
        access_key, secret_key = PROFILES["default"]
        return S3Store(
            self.bucket, prefix=prefix or None, endpoint=self.endpoint, region=self.region,
            access_key_id=access_key, secret_access_key=secret_key, client_options={"allow_http": True},
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=2)}, **settings,
        )  # fmt: skip

    def start(self) -> None:
        """Returns when it serves the bucket."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self.line, stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + READY_S
        while True:
            assert self.process.poll() is None, f"weed ended: {self._log()}"
            assert time.monotonic() < deadline, f"weed does not serve: {self._log()}"
            try:
                if self._status() == 403:  # who are you?
                    obstore.put(self.client(), "ready", bytes(1000), use_multipart=False)  # makes bucket and volumes
                    return
            except (OSError, http.client.HTTPException, obstore.exceptions.BaseError):
                pass
            time.sleep(0.05)

    def _status(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status
        finally:
            connection.close()

    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """With no regard for anything."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def serving(folder: Path, certificates: Certificates | None = None) -> Iterator[SeaweedFS]:
    """A server, and the environment of a user who may use it and has no other settings for S3."""
    server = SeaweedFS(folder, certificates)
    with pytest.MonkeyPatch.context() as patch:
        without_settings(patch)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(server.credentials))
        try:
            server.start()
            yield server
        finally:
            server.kill()


def without_settings(patch: pytest.MonkeyPatch) -> None:
    """What this machine's user has set for S3 is not seen."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
