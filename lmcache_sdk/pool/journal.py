"""What lies in the pool, in memory that outlives the daemon: the control file beside the segments.

Whatever is in it is true at every instant, however the daemon ends: each change is one store of eight aligned bytes,
or becomes visible by one. (Against a machine that goes down it need not help: the pool is memory.) All multi-byte
values are the machine's own::

    0        the fixed part: magic, version, geometry, checksum
    128      the generation, 8 bytes: another in each life of the pool
    4096     clients, 64 bytes each: id (16), pid, start time, mark (8 each)
    69632    spaces: length, checksum (8 each), bytes, padded to 8; a length of 0 ends the list
    1118208  slots, 16 bytes each: one for each extent

A slot is two words: the extent's address / 64; and, from the lowest bit, check (12), leases (22), state (2), size / 64
(28). The second word is 0 in a free slot, and decides; the check covers both.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from logging import getLogger
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache_sdk.core.extents import ALIGNMENT, SEGMENT_SHIFT
from lmcache_sdk.errors import BackendFormatError
from lmcache_sdk.pool import segment_sizes
from lmcache_sdk.records import checksum

__all__ = ["ControlBroken", "ExtentState", "Generation", "Geometry", "Journal", "Recovered", "RecoveredClient"]

_log = getLogger(__name__)

_MAGIC = b"LMCSDKPL"
_VERSION = 1
# In every version: magic, version at the start, a checksum of the first 120 bytes behind them. Between them are pool
# bytes, segment bytes, slots.
_FIXED = struct.Struct("=8sQQQQ80x")
_FIXED_BYTES = 128
_GENERATION = 128
_CLIENTS = 4096
_CLIENT_BYTES = 64
_CLIENT_SLOTS = 1024
_SPACES = _CLIENTS + _CLIENT_BYTES * _CLIENT_SLOTS
_SPACES_BYTES = 1 << 20
_SLOTS = _SPACES + _SPACES_BYTES
_SLOT_BYTES = 16
_TYPICAL_EXTENT_BYTES = 16 << 10
_SPARE_SLOTS = 4096

_CHECK_BITS, _LEASE_BITS, _STATE_BITS, _SIZE_BITS = 12, 22, 2, 28
_PRIME = 4093  # the largest below 2 ** 12: no flip of one bit leaves the remainder as it was
_STATE_AT = _LEASE_BITS
_SIZE_AT = _LEASE_BITS + _STATE_BITS
_MOST_LEASES = (1 << _LEASE_BITS) - 1
_MOST_BYTES = ((1 << _SIZE_BITS) - 1) * ALIGNMENT
assert _CHECK_BITS + _LEASE_BITS + _STATE_BITS + _SIZE_BITS == 64


class ControlBroken(Exception):
    """The control file is not one, or contradicts itself: nothing in the pool can be relied upon."""


class ExtentState(IntEnum):
    """BUSY: allocated, a client may be writing. SEALED: complete with its header, and it does not change."""

    BUSY = 1
    SEALED = 2


class Recovered(NamedTuple):
    """An extent that an earlier life has left. ``nbytes`` is a multiple of 64."""

    address: int
    nbytes: int
    state: ExtentState
    leases: int


class RecoveredClient(NamedTuple):
    """A client that had not left when the earlier life ended; see :func:`lmcache_sdk.pool.processes.process_alive`."""

    client_id: bytes
    pid: int
    started: int


class Geometry(NamedTuple):
    """Sizes in bytes."""

    pool_bytes: int
    segment_bytes: int

    @property
    def sizes(self) -> list[int]:
        return segment_sizes(self.pool_bytes, self.segment_bytes)

    @property
    def slots(self) -> int:
        """How many extents there can be: generous for what engines store, 0.1 % of the pool."""
        return self.pool_bytes // _TYPICAL_EXTENT_BYTES + _SPARE_SLOTS

    @property
    def control_bytes(self) -> int:
        return _SLOTS + self.slots * _SLOT_BYTES


class Journal:
    """The control file, mapped; its one writer. Not thread-safe: the store's lock guards it.

    The caller's part: an extent's content is complete before ``sealed`` and stays until ``busy`` or ``freed``; ``freed``
    comes before the bytes are given to anyone else.

    Attributes:
        generation: this life of the pool; never 0.
        recovered: what an earlier life has left, ascending: inside the segments and without overlaps.
        earlier_clients: who had not left by then. They stay listed until :meth:`client_left`.
        recovered_spaces: what was saved, oldest first.

    Raises:
        ControlBroken: see there. Nothing has been written.
        BackendFormatError: it was written by another version.
    """

    def __init__(self, descriptor: int, geometry: Geometry) -> None:
        check_fixed(descriptor, geometry)
        self._map = mmap.mmap(descriptor, geometry.control_bytes)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._slots = geometry.slots
        self._slot_of: dict[int, int] = {}  # address -> index of the slot's second word
        self.recovered = self._read_slots(descriptor, geometry.sizes)
        self._client_at: dict[bytes, int] = {}
        self.earlier_clients = self._read_clients()
        self._spaces_end = _SPACES
        self.recovered_spaces = self._read_spaces()
        self._spaces = set(self.recovered_spaces)
        used = {at for at in self._slot_of.values()}
        first = _SLOTS // 8 + 1
        self._fresh = max(used, default=first - 2) + 2  # from here on slots have never been used
        self._freed = [at for at in range(first, self._fresh, 2) if at not in used]
        self._end = first + self._slots * 2
        self.generation = (self._words[_GENERATION // 8] + 1) % (1 << 64) or 1
        self._words[_GENERATION // 8] = self.generation

    # Extents

    def allocated(self, address: int, nbytes: int) -> bool:
        """Note a new extent, BUSY. False if there is no slot left for it: the pool is full.

        Args:
            nbytes: of the extent, at most 16 GiB; counted in units of 64.
        """
        assert address not in self._slot_of, "it would be there twice"
        if self._freed:
            at = self._freed.pop()
        elif self._fresh < self._end:
            at, self._fresh = self._fresh, self._fresh + 2
        else:
            return False
        assert 0 < nbytes <= _MOST_BYTES
        place = address // ALIGNMENT
        body = -(-nbytes // ALIGNMENT) << _SIZE_AT | ExtentState.BUSY << _STATE_AT
        self._words[at - 1] = place
        self._words[at] = body << _CHECK_BITS | (place ^ body) % _PRIME
        self._slot_of[address] = at
        return True

    def sealed(self, addresses: Iterable[int]) -> None:
        """Their records are complete, headers included."""
        self._set_state(addresses, ExtentState.SEALED)

    def busy(self, addresses: Iterable[int]) -> None:
        """They are no records any more, though somebody may still hold them."""
        self._set_state(addresses, ExtentState.BUSY)

    def freed(self, address: int) -> None:
        """The bytes may be given out again."""
        at = self._slot_of.pop(address)
        self._words[at] = 0
        self._freed.append(at)

    def leased(self, addresses: Iterable[int], step: int = 1) -> None:
        """Count leases up or, with a negative step, down. A count that has reached 4 million stays: the safe side."""
        words, slot_of = self._words, self._slot_of
        for address in addresses:
            at = slot_of[address]
            body = words[at] >> _CHECK_BITS
            leases = body & _MOST_LEASES
            if leases < _MOST_LEASES:
                body += min(max(leases + step, 0), _MOST_LEASES) - leases
                words[at] = body << _CHECK_BITS | (words[at - 1] ^ body) % _PRIME

    def _set_state(self, addresses: Iterable[int], state: ExtentState) -> None:
        words, slot_of = self._words, self._slot_of
        keep, bits = ~(((1 << _STATE_BITS) - 1) << _STATE_AT), int(state) << _STATE_AT
        for address in addresses:
            at = slot_of[address]
            body = words[at] >> _CHECK_BITS & keep | bits
            words[at] = body << _CHECK_BITS | (words[at - 1] ^ body) % _PRIME

    # Clients

    def client_joined(self, client_id: bytes, pid: int, started: int) -> bool:
        """List a client (again). False if there are 1,024 already.

        Args:
            client_id: 16 bytes.
            started: see :func:`lmcache_sdk.pool.processes.start_time`.
        """
        at = self._client_at.get(client_id)
        if at is None:
            taken = set(self._client_at.values())
            step = _CLIENT_BYTES // 8
            free = (n for n in range(_CLIENTS // 8, _SPACES // 8, step) if n not in taken)
            at = next(free, None)
            if at is None:
                return False
        row = struct.pack("=16sQQ", client_id, pid, started)
        assert len(client_id) == 16
        self._words[at + 4] = 0
        self._bytes[at * 8 : at * 8 + 32] = row
        self._words[at + 4] = _mark(row)
        self._client_at[client_id] = at
        return True

    def client_left(self, client_id: bytes) -> None:
        """It can no longer touch the pool. Idempotent."""
        at = self._client_at.pop(client_id, None)
        if at is not None:
            self._words[at + 4] = 0

    # Spaces

    def save_space(self, space: bytes) -> bool:
        """Keep what describes a space, once. False if the room for all of them (1 MiB) is used up."""
        if space in self._spaces:
            return True
        at = self._spaces_end
        end = at + 16 + -(-len(space) // 8) * 8
        if not space or end > _SLOTS:
            return False
        if end < _SLOTS:
            self._words[end // 8] = 0
        self._bytes[at + 16 : at + 16 + len(space)] = space
        self._words[at // 8 + 1] = checksum(space)
        self._words[at // 8] = len(space)
        self._spaces_end = end
        self._spaces.add(space)
        return True

    # Recovery

    def _read_slots(self, descriptor: int, sizes: list[int]) -> list[Recovered]:
        """All extents, if all are sound. One that is not may be anywhere, with a client that writes to it."""
        found = [words[words[:, 1] != 0] for words in _in_pieces(descriptor, _SLOTS, self._slots)]
        starts = np.concatenate([...]) if False else None
        raise NotImplementedError

    def _read_clients(self) -> list[RecoveredClient]:
        raise NotImplementedError

    def _read_spaces(self) -> list[bytes]:
        raise NotImplementedError
