"""``backend``: a store that does what it must, some that do not, and what is left of the check."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_backends.file import FileBackend
from lmcache_sdk.backend import ENTRY_POINTS
from lmcache_sdk.cli import backend as module
from lmcache_sdk.cli.commands import app
from lmcache_sdk.cli.doctor import _plugin
from lmcache_sdk.testing.backends import MUSTS, BackendTests, item, must_of
from lmcache_sdk.tiers import open_tier

# Backends that each break one MUST, as an installed package of somebody else brings them.
BROKEN = """
from lmcache_backends.file import FileBackend
from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.backend import Miss
from lmcache_sdk.errors import BackendUnavailable


class Changing(MemoryBackend):
    def get(self, keys, buffers):
        answers = super().get(keys, buffers)
        for answer, buffer in zip(answers, buffers):
            if not isinstance(answer, Miss) and answer > 100_000:
                buffer[answer - 1] ^= 1
        return answers


class Overrunning(MemoryBackend):
    def get(self, keys, buffers):
        answers = super().get(keys, buffers)
        for answer, buffer in zip(answers, buffers):
            if not isinstance(answer, Miss) and answer < len(buffer):
                buffer[answer] = 0
        return answers


class Deaf(MemoryBackend):
    def close(self, timeout_s):
        pass


class Sticky(FileBackend):
    def delete(self, keys):
        return len(keys)


class Failing(MemoryBackend):
    def put(self, items, *, if_absent=True):
        raise BackendUnavailable("nobody is at home")
"""


@pytest.fixture
def others(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which they are installed."""
    place = tmp_path / "site"
    info = place / "other_backends-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-backends\nVersion: 1.0\n")
    names = ("Changing", "Overrunning", "Deaf", "Sticky", "Failing")
    lines = [f"{name.lower()} = other_backends:{name}" for name in names]
    lines += ["optional = no_such_module_here:Lost [client]", "older = other_backends:Absent"]
    (info / "entry_points.txt").write_text("\n".join(["[lmcache_sdk.backends]", *lines, ""]))
    (place / "other_backends.py").write_text(BROKEN)
    return {**os.environ, "PYTHONPATH": str(place)}


COMMAND = [sys.executable, "-m", "lmcache_sdk.cli", "backend"]


def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=env, check=False, timeout=55)
    return done.returncode, done.stdout + done.stderr


def records(place: Path) -> list[str]:
    store = FileBackend(place, 1 << 30)
    found = [stat.key for stat in store.scan()]
    store.close(5)
    return found


def test_a_store_that_does_what_it_must(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store?size=1GiB"
    store = FileBackend(tmp_path / "store", 1 << 30)
    store.put([item("of/others", b"1")])
    store.close(5)
    status, output = run("check", url)
    assert status == 0, output
    assert "37 passed, 0 failed, 4 skipped" in output
    assert "skipped  usage: a store in use counts other records, too" in output
    for row in ("1 MiB", "4 MiB", "8 MiB"):
        assert len(next(line for line in output.splitlines() if row in line[:8]).split()) == 8
    assert "a file beside the store" in output and "of 500 keys: contains" in output
    assert "\nleft" not in output
    assert records(tmp_path / "store") == ["of/others"]


def test_with_options_of_a_tier_and_no_second_client(tmp_path: Path) -> None:
    status, output = run("check", "--no-measure", f"lmdb://{tmp_path}/store?size=256MiB#prefix=teamA")
    assert status == 0, output
    assert "looked at by the client that wrote it" in output
    assert "Throughput" not in output


def test_a_store_that_keeps_nothing() -> None:
    status, output = run("check", "noop://")
    assert status == 0, output
    assert "ok       storing nothing" in output
    assert "Throughput" not in output


@pytest.mark.parametrize(
    ("scheme", "must"),
    [("changing", "1: get returns"), ("overrunning", "3: a buffer is not"), ("deaf", "8: closing is final")],
)
def test_a_broken_backend_is_told_which_must(others: dict[str, str], scheme: str, must: str) -> None:
    status, output = run("check", f"--{'' if scheme == 'changing' else 'no-'}measure", f"{scheme}://", env=others)
    assert status == 1
    assert ("get gave other bytes" in output) == (scheme == "changing")
    broken = [line.partition("breaks MUST ")[2] for line in output.splitlines() if "breaks MUST" in line]
    assert broken and broken[0].startswith(must), output


def test_what_is_left_is_told(others: dict[str, str], tmp_path: Path) -> None:
    status, output = run("check", "--no-measure", f"sticky://{tmp_path}/store?size=1GiB", env=others)
    assert status == 1
    assert "breaks MUST 5: nothing is left" in output
    assert "records that were deleted are still there" in output
    assert "\nleft     under check-" in output


def test_a_store_that_is_down_is_one_line(others: dict[str, str]) -> None:
    status, output = run("check", "failing://", env=others)
    assert status == 1
    assert "nobody is at home" in output
    assert "Traceback" not in output


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store?size=1GiB"
    with subprocess.Popen(
        [*COMMAND, "check", url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as check:
        assert check.stdout is not None
        seen = [line for line, _ in zip(check.stdout, range(12), strict=False)]
        check.send_signal(signal.SIGINT)
        rest = check.stdout.read()
        assert check.wait(30) != 0
    assert any(line.startswith("ok") for line in seen)
    assert "passed" not in rest
    assert "Traceback" not in rest
    assert records(tmp_path / "store") == []


@pytest.mark.parametrize("url", ["nothing://", "memory://?sise=1", "memory://#prefix=a b", "text"])
def test_bad_urls(url: str) -> None:
    status, output = run("check", url)
    assert status == 2
    assert output.startswith("lmcache-sdk: ")


def test_a_password_is_not_shown() -> None:
    _, output = run("check", "nothing://user:hunter2@host")
    assert "hunter2" not in output


def test_without_pytest_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["backend", "check", "memory://"])
    assert result.exit_code == 2
    assert "needs the package 'pytest': pip install 'lmcache-sdk[testing]'" in result.output


def test_list_and_doctor_tell_what_is_installed(others: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, output = run("list", env=others)
    assert status == 0
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert lines["memory://"].endswith("installed")
    assert lines["optional://"].endswith("other-backends 1.0  pip install 'other-backends[client]'")
    assert "does not load" in lines["older://"]
    monkeypatch.syspath_prepend(others["PYTHONPATH"])
    optional, older = (next(iter(entry_points(group=ENTRY_POINTS, name=name))) for name in ("optional", "older"))
    finding = _plugin("backend", optional)
    assert (finding.status, finding.text) == ("ok", "not installed (other-backends 1.0)")
    assert finding.fix == "pip install 'other-backends[client]', if you want to use it"
    assert _plugin("backend", older).status == "bad"


def test_every_test_of_the_suite_belongs_to_a_must() -> None:
    tests = {name for name in vars(BackendTests) if name.startswith("test_")}
    assert tests == {test for names in MUSTS.values() for test in names}
    assert must_of("test_delete").startswith("5: ")


def test_tools_take_the_options_of_a_tier(tmp_path: Path) -> None:
    """What `ls`, `clear` and `doctor` look at is what the cache uses."""
    url = f"lmdb://{tmp_path}/store?size=64MiB"
    key = f"{'a' * 32}/{'b' * 16}/exact/{'c' * 64}/full/L0-1.H0-1"
    for part in ("", "#prefix=teamA"):
        backend = open_tier(url + part).backend
        backend.put([item(key, b"1")])
        backend.close(5)
    call = CliRunner().invoke
    assert json.loads(call(app, ["du", "--json", f"{url}#prefix=teamA"]).stdout)["total"]["records"] == 1
    assert call(app, ["doctor", "--no-measure", "--url", f"{url}#prefix=teamA"]).exit_code == 0
    assert call(app, ["clear", "--yes", f"{url}#prefix=teamA"]).exit_code == 0
    backend = open_tier(url).backend
    assert backend.contains([key, f"teamA/{key}"]) == [True, False]
    backend.close(5)
