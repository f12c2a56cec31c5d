from pathlib import Path

from lmcache_backends.file import FileBackend
from lmcache_sdk.testing.backends import BackendTests, backend_state_machine


class TestFile(BackendTests):
    durable = True  # opening the same place again finds the records
    bound = 8 << 20  # which it holds by eviction

    def open(self, place: Path) -> FileBackend:
        return FileBackend(place / "kv", self.bound)

    def raw_get(self, backend: FileBackend, key: str) -> bytes | None:
        return path.read_bytes() if (path := backend.path_of(key)).exists() else None

    def raw_set(self, backend: FileBackend, key: str, data: bytes) -> None:
        backend.path_of(key).parent.mkdir(parents=True, exist_ok=True)
        backend.path_of(key).write_bytes(data)


TestFileAtRandom = backend_state_machine(TestFile()).TestCase
