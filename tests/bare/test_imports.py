"""The package with its hard dependencies only: unittest, since pytest is not among them."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import unittest
from importlib import metadata
from pathlib import Path

from lmcache_sdk.backend import open_backend
from lmcache_sdk.errors import ConfigError

PACKAGES = ("lmcache_sdk", "lmcache_adapters", "lmcache_backends")
EXTRAS = (
    "torch", "transformers", "vllm", "sglang", "matplotlib", "pytest", "hypothesis", "cryptography", "mooncake",
    "obstore", "redis", "valkey",
)  # fmt: skip
# Suites for other people's tests: whoever imports them has pytest.
NEEDS_TEST_TOOLS = "lmcache_sdk.testing"


def modules(package: str) -> list[str]:
    paths = importlib.import_module(package).__path__
    return [package, *(module.name for module in pkgutil.walk_packages(paths, f"{package}."))]


class ImportsTest(unittest.TestCase):
    def test_no_extra_is_installed(self) -> None:
        self.assertEqual([name for name in EXTRAS if importlib.util.find_spec(name)], [])

    def test_every_core_module_imports(self) -> None:
        for name in modules("lmcache_sdk"):
            if not name.startswith(NEEDS_TEST_TOOLS):
                with self.subTest(name):
                    importlib.import_module(name)

    def test_adapters_and_backends_import(self) -> None:
        for name in ("lmcache_adapters", "lmcache_backends"):
            importlib.import_module(name)

    def test_built_in_entry_points_load(self) -> None:
        for group in ("backends", "codecs", "kernels", "commands"):
            points = metadata.entry_points(group=f"lmcache_sdk.{group}")
            self.assertTrue(points, group)
            for point in points:
                with self.subTest(f"{group}: {point.name}"):
                    if not point.extras:
                        self.assertTrue(callable(point.load()))

    def test_a_backend_that_needs_an_extra_says_which(self) -> None:
        optional = [point for point in metadata.entry_points(group="lmcache_sdk.backends") if point.extras]
        self.assertTrue(optional)
        for point in optional:
            with self.subTest(point.name):
                (extra,) = point.extras
                expected = rf"{re.escape(point.name)}:// needs the package '\w+': pip install 'lmcache-sdk\[{extra}\]'"
                try:
                    open_backend(f"{point.name}://host")
                except ConfigError as error:
                    self.assertRegex(str(error), f"^{expected}$")
                else:
                    self.fail("it opened")

    def test_the_command_answers(self) -> None:
        for option in ("--version", "--help"):
            command = [str(Path(sys.executable).with_name("lmcache-sdk")), option]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("demo", done.stdout)


if __name__ == "__main__":
    unittest.main()
