"""Which kernel package serves a device: found by metadata, overridden by a setting, imported at first use."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmcache_sdk.cli import app
from lmcache_sdk.errors import ConfigError, LayoutError
from lmcache_sdk.kernels import CPUKernels, choose, describe_kernels, kernels_for

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts packages of one module with kernels on the path; the module is imported nowhere else."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def add(package: str, **announced: str) -> None:
        module = package.replace("-", "_").lower()
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{kind} = {value or f'{module}:Fake'}\n" for kind, value in announced.items()]
        (info / "entry_points.txt").write_text("".join(["[lmcache_sdk.kernels]\n", *lines]))
        (tmp_path / f"{module}.py").write_text(f"class Fake:\n    name = '{module}'\n    device_types = ('fakedev',)\n")
        importlib.invalidate_caches()
        modules.append(module)

    yield add
    for module in modules:
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("device", "package"),
    [("cuda:0", "lmcache-kernels-cuda"), ("npu:1", "lmcache-kernels-ascend"), ("tpu", "lmcache_sdk.kernels")],
)
def test_a_missing_package_is_named(device: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmcache_sdk.kernels.choice.entry_points", lambda group: ())
    with pytest.raises(LayoutError, match=package):
        kernels_for(device)
    assert isinstance(kernels_for("cpu"), CPUKernels)


def test_an_installed_package_is_found_and_only_it_is_imported(install: Install) -> None:
    install("fake-kernels", fakedev="", broken="no_such_module_here:Nothing")
    install("other-kernels", otherdev="")
    assert describe_kernels()["fakedev"] == "fake_kernels:Fake (fake-kernels 1.2): the only one installed"
    assert "fake_kernels" not in sys.modules
    assert kernels_for("fakedev:3").name == "fake_kernels"
    assert kernels_for("fakedev:3") is kernels_for("fakedev:0")
    assert isinstance(kernels_for("cpu"), CPUKernels)
    assert "other_kernels" not in sys.modules
    with pytest.raises(LayoutError, match="no_such_module_here"):
        kernels_for("broken")


def test_a_package_that_fails_in_any_way_is_named(install: Install, tmp_path: Path) -> None:
    install("failing-kernels", fakedev="")
    (tmp_path / "failing_kernels.py").write_text("class Fake:\n    def __init__(self): 1 / 0\n")
    with pytest.raises(
        LayoutError, match=r"'failing_kernels:Fake' for fakedev do not load: ZeroDivisionError: division"
    ):
        kernels_for("fakedev")


def test_threads_get_the_same_kernels(install: Install, tmp_path: Path) -> None:
    """Two would not know of each other's pins."""
    install("slow-kernels", fakedev="")
    (tmp_path / "slow_kernels.py").write_text("import time\nclass Fake:\n    def __init__(self): time.sleep(0.05)\n")
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(kernels_for, ["fakedev:0"] * 4))
    assert len(found) == 1


def test_of_several_packages_a_setting_names_one(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("First.Kernels", fakedev="first_kernels:Fake")
    install("second-kernels", fakedev="")
    with pytest.raises(ConfigError, match="first-kernels, second-kernels; name one in the setting kernels"):
        choose("fakedev")
    assert "name one in the setting" in describe_kernels()["fakedev"]
    monkeypatch.setenv("LMCACHE_SDK_KERNELS", "{fakedev: Second_Kernels}")
    assert kernels_for("fakedev").name == "second_kernels"
    assert "first_kernels" not in sys.modules
    assert describe_kernels()["fakedev"].endswith("the setting kernels names it")


def test_doctor_says_which_and_why_and_what_cannot_be_measured(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("odd-kernels", odddev="", other="")
    (tmp_path / "odd_kernels.py").write_text(
        "from tests.core.late_device import LateDevice, LateKernels\n"
        "class Fake(LateKernels):\n"
        "    def __init__(self): super().__init__(LateDevice())\n"
        "    def allocate(self, device, nbytes): raise RuntimeError(f'{device} is full')\n"
    )
    monkeypatch.setenv("LMCACHE_SDK_KERNELS", "{other: absent}")
    answer = CliRunner().invoke(app, ["doctor", "--url", "memory://", "--json"])
    findings = {(f["topic"], f["name"]): f for f in json.loads(answer.output)["findings"]}
    chosen = findings["installed", "kernels odddev"]
    assert chosen["text"] == "odd_kernels:Fake (odd-kernels 1.2): the only one installed"
    assert findings["speed", "odddev:0"]["text"] == "not measured: RuntimeError: odddev:0 is full"
    refused = findings["installed", "kernels other"]
    assert refused["status"] == "warn" and refused["text"].count("'absent'") == 1


def test_the_projects_own_go_before_others_unless_a_setting_says_so(install: Install) -> None:
    install("fast-cpu", cpu="")
    assert choose("cpu", {}).package == "lmcache-sdk"
    assert choose("cpu", {}).why == "the project's own; the setting kernels may name fast-cpu"
    assert choose("cpu", {"cpu": "fast-cpu"}).entry.value == "fast_cpu:Fake"


@pytest.mark.parametrize(("kind", "have"), [("cpu", "installed are: .*lmcache-sdk"), ("tpu", "no installed package")])
def test_a_setting_that_names_what_is_not_there(kind: str, have: str) -> None:
    with pytest.raises(ConfigError, match=f"'absent'.*{have}"):
        choose(kind, {kind: "absent"})
