"""Random calls on each backend against a dict."""

from pathlib import Path

from hypothesis import HealthCheck, settings

from lmcache_backends.lmdb import LMDBBackend
from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.testing.backends import BackendTests, backend_state_machine


class Memory(BackendTests):
    def open(self, place: Path) -> MemoryBackend:
        return MemoryBackend(self.bound)


class SmallMemory(Memory):
    bound = 400_000


class LMDB(BackendTests):
    durable = True
    size = 32 << 20

    def open(self, place: Path) -> LMDBBackend:
        return LMDBBackend(place / "store", self.size)


class SmallLMDB(LMDB):
    size = bound = 1 << 20


TestMemory = backend_state_machine(Memory()).TestCase
TestSmallMemory = backend_state_machine(SmallMemory()).TestCase
TestLMDB = backend_state_machine(LMDB()).TestCase
TestSmallLMDB = backend_state_machine(SmallLMDB()).TestCase

for case in (TestMemory, TestSmallMemory, TestLMDB, TestSmallLMDB):
    case.settings = settings(
        max_examples=50,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
del case  # pytest would collect it
