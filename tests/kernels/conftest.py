"""Stand-ins for what this machine lacks: Triton's interpreter for a GPU, a stub for its driver."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: the decorator decides

HERE = Path(__file__).parent
INCLUDE = {"cuda": "nvidia/include", "hip": "amd/include"}


class Stub:
    """A driver of ours: what it was asked for, and what is to fail."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stub_lines.restype = ctypes.c_char_p
        self._library.stub_current.restype = ctypes.c_size_t
        self._library.stub_reset()

    def lines(self) -> list[str]:
        """The calls so far: a name without the vendor's prefix, then numbers."""
        return self._library.stub_lines().decode().splitlines()

    def names(self) -> list[str]:
        return [line.split()[0] for line in self.lines()]

    def current(self) -> int:
        """The context or device of the calling thread; 0 = none, or HIP's first."""
        return int(self._library.stub_current())

    def capture(self) -> None:
        """From now on, a thread that is not in the test captures a graph."""
        self._library.stub_capture()

    @property
    def spoiled(self) -> bool:
        """Whether a call has spoiled the graph."""
        return bool(self._library.stub_spoiled())

    @property
    def mode(self) -> int:
        """Of the calling thread towards captures; 0 is the default."""
        return int(self._library.stub_mode())

    def clear(self) -> None:
        self._library.stub_clear()

    def fail(self, name: str, code: int) -> None:
        """From now on, such a call fails, and no other."""
        self._library.stub_fail(name.encode(), code)


Build = Callable[..., Stub]


@pytest.fixture(scope="session")
def build_stub(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compile a stub driver: ``cuda``, ``hip`` or ``acl``, with one of the forms of the batched copy."""
    import triton  # whose wheel has both vendors' headers

    built: dict[tuple[str, int], Path] = {}

    def build(vendor: str, batch: int = 2) -> Stub:
        if (vendor, batch) not in built:
            target = tmp_path_factory.mktemp("stub") / f"{vendor}{batch}.so"
            flags = ["-DHIP"] if vendor == "hip" else ["-D__CUDA_API_VERSION_INTERNAL"] if batch == 1 else []
            if vendor in INCLUDE:
                flags += ["-I", str(Path(triton.__file__).parent / "backends" / INCLUDE[vendor])]
            source = HERE / ("stub_acl.c" if vendor == "acl" else "stub_driver.c")
            command = ["cc", "-Wall", "-Werror", "-Wno-unused-function", "-shared", "-fPIC", f"-DBATCH={batch}", *flags]
            subprocess.run([*command, str(source), "-o", str(target)], check=True)
            built[vendor, batch] = target
        return Stub(built[vendor, batch])

    return build
