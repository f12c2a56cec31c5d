"""What lies in the pool, in memory that outlives the daemon: the control file beside the segments.

Whatever is in it is true at every instant, however the daemon ends: each change is one store of eight aligned bytes,
or becomes visible by one. (Against a machine that goes down it need not help: the pool is memory.) All multi-byte
values are the machine's own::

    0        the fixed part: magic, version, geometry, checksum
    4096     clients, 64 bytes each: id (16), pid, start time, mark (8 each)
    69632    spaces: length, checksum (8 each), bytes, padded to 8; a length of 0 ends the list
    1118208  slots, 16 bytes each: one for each extent

A slot is two words: the extent's address / 64; and, from the lowest bit, check (12), leases (22), state (2), size / 64
(28). The second word is 0 in a free slot, and decides. The check is the sum of all else, modulo 4093: no flip of one
bit leaves it as it was.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from logging import getLogger
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lmcache_sdk.core.extents import ALIGNMENT, SEGMENT_SHIFT
from lmcache_sdk.core.parted import ByAddress
from lmcache_sdk.errors import BackendFormatError
from lmcache_sdk.pool import segment_sizes
from lmcache_sdk.pool.mapping import is_complete
from lmcache_sdk.pool.processes import may_live
from lmcache_sdk.records import checksum

_log = getLogger(__name__)

_MAGIC = b"LMCSDKPL"
_VERSION = 1
# In every version: magic and version, and behind 120 bytes their checksum. Here between them: the geometry.
_FIXED = struct.Struct("=8sQQQ88x")
assert _FIXED.size == 120
_CLIENTS = 4096
_CLIENT_BYTES = 64
_CLIENT_SLOTS = 1024
_CLIENT_FIELDS = struct.Struct("=16sQQ")  # then the mark
_SPACES = _CLIENTS + _CLIENT_BYTES * _CLIENT_SLOTS
_SPACES_BYTES = 1 << 20
_SLOTS = _SPACES + _SPACES_BYTES
_SLOT_BYTES = 16
_SLOTS_READ = 1 << 16  # at once, at recovery
_TYPICAL_EXTENT_BYTES = 16 << 10
_SPARE_SLOTS = 4096

_CHECK_BITS, _LEASE_BITS, _STATE_BITS, _SIZE_BITS = 12, 22, 2, 28
_UNIT_BITS = 6
assert ALIGNMENT == 1 << _UNIT_BITS
_OFFSET_MASK = (1 << (SEGMENT_SHIFT - _UNIT_BITS)) - 1
_PRIME = 4093  # the largest below 2 ** 12
_STATE_AT = _LEASE_BITS
_SIZE_AT = _LEASE_BITS + _STATE_BITS
_CHECK = (1 << _CHECK_BITS) - 1
_MOST_LEASES = (1 << _LEASE_BITS) - 1
_MOST_BYTES = ((1 << _SIZE_BITS) - 1) * ALIGNMENT
assert _CHECK_BITS + _LEASE_BITS + _STATE_BITS + _SIZE_BITS == 64


class ControlBroken(Exception):
    """The control file is not one, or contradicts itself: nothing in the pool can be relied upon."""


class ExtentState(IntEnum):
    """BUSY: allocated, a client may be writing. SEALED: complete with its header, and it does not change."""

    BUSY = 1
    SEALED = 2


# As they stand in a slot's word, its check shifted out. Plain numbers: arithmetic with an enumeration's is slow.
_BUSY = int(ExtentState.BUSY) << _STATE_AT
_SEALED = int(ExtentState.SEALED) << _STATE_AT
_STATES = ((1 << _STATE_BITS) - 1) << _STATE_AT


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

    The caller's part: an extent's content is complete before ``sealed`` and stays until ``busy`` or ``freed``;
    ``freed`` comes before the bytes are given to anyone else.

    Attributes:
        recovered: what an earlier life has left, ascending: inside the segments and without overlaps. It may be many;
            who has taken them over may clear the list.
        earlier_clients: who had not left by then. They stay listed until :meth:`client_left`.
        recovered_spaces: what was saved, oldest first.

    Args:
        descriptor: of the control file, which may be closed then.
        geometry: what :func:`read_geometry` has found in it.

    Raises:
        ControlBroken: see there. Nothing has been written.
    """

    def __init__(self, descriptor: int, geometry: Geometry) -> None:
        self._map = mmap.mmap(descriptor, geometry.control_bytes)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._slots = geometry.slots
        self._slot_of: ByAddress[int] = ByAddress()  # index of the slot's second word
        self.recovered = self._read_slots(descriptor, geometry.sizes)
        self._clients: dict[bytes, int] = {}  # row -> its first word
        self.earlier_clients = self._read_clients()
        self._spaces_end = _SPACES
        self.recovered_spaces = self._read_spaces()
        self._spaces = set(self.recovered_spaces)
        self._full = False
        used = set(self._slot_of.values())
        first = _SLOTS // 8 + 1
        self._fresh = max(used, default=first - 2) + 2  # from here on slots have never been used
        self._freed = [at for at in range(first, self._fresh, 2) if at not in used]
        self._end = first + self._slots * 2

    def close(self) -> None:
        """Any further change raises ValueError."""
        self._words.release()
        self._bytes.release()
        self._map.close()

    @property
    def capacity(self) -> int:
        """How many extents can be listed."""
        return self._slots

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
        body = -(-nbytes // ALIGNMENT) << _SIZE_AT | _BUSY
        self._words[at - 1] = place
        self._words[at] = body << _CHECK_BITS | (place + body) % _PRIME
        self._slot_of[address] = at
        return True

    def sealed(self, addresses: Iterable[int]) -> None:
        """Their records are complete, headers included."""
        self._set_state(addresses, _SEALED)

    def busy(self, addresses: Iterable[int]) -> None:
        """They are no records any more, though somebody may still hold them."""
        self._set_state(addresses, _BUSY)

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
            word = words[at]
            check, leases = word & _CHECK, word >> _CHECK_BITS & _MOST_LEASES
            if leases < _MOST_LEASES:
                change = step if 0 <= leases + step <= _MOST_LEASES else -leases if step < 0 else _MOST_LEASES - leases
                words[at] = word + (change << _CHECK_BITS) + (check + change) % _PRIME - check

    def _set_state(self, addresses: Iterable[int], state: int) -> None:
        words, slot_of = self._words, self._slot_of
        for address in addresses:
            at = slot_of[address]
            word = words[at]
            check, change = word & _CHECK, state - (word >> _CHECK_BITS & _STATES)
            words[at] = word + (change << _CHECK_BITS) + (check + change) % _PRIME - check

    # Clients

    def client_joined(self, client_id: bytes, pid: int, started: int) -> bool:
        """List a client; one that is listed already is not listed twice. False if there are 1,024 that may still live.

        Args:
            client_id: 16 bytes. With another process it is listed beside the first: that may still be writing.
            started: see :func:`lmcache_sdk.pool.processes.identity`.
        """
        assert len(client_id) == 16
        row = _CLIENT_FIELDS.pack(client_id, pid, started)
        if row in self._clients:
            return True
        if len(self._clients) == _CLIENT_SLOTS:
            self._drop_dead_clients()
        taken = set(self._clients.values())
        at = next((at for at in range(_CLIENTS // 8, _SPACES // 8, _CLIENT_BYTES // 8) if at not in taken), None)
        if at is None:
            return False
        self._bytes[at * 8 : at * 8 + len(row)] = row
        self._words[at + len(row) // 8] = _mark(row)
        self._clients[row] = at
        return True

    def client_left(self, client_id: bytes) -> None:
        """It can no longer touch the pool, from no process. Idempotent."""
        for row in [row for row in self._clients if row.startswith(client_id)]:
            self._drop_client(row)

    def _drop_client(self, row: bytes) -> None:
        self._words[self._clients.pop(row) + len(row) // 8] = 0

    def _drop_dead_clients(self) -> None:
        """Of those whose process is gone nobody needs to hear that they have left."""
        for row in list(self._clients):
            _, pid, started = _CLIENT_FIELDS.unpack(row)
            if not may_live(pid, started):
                self._drop_client(row)

    # Spaces

    def save_space(self, space: bytes) -> bool:
        """Keep what describes a space, once. False if the room for all of them (1 MiB) is used up, which is logged."""
        if space in self._spaces:
            return True
        at = self._spaces_end
        end = _end_of_space(at, len(space))
        if not space or end > _SLOTS:
            if not self._full:
                _log.warning("the pool's list of models and engines is full; what others store is lost at a restart")
            self._full = True
            return False
        if end < _SLOTS:
            self._words[end // 8] = 0
        self._bytes[at + 16 : at + 16 + len(space)] = space
        self._words[at // 8 + 1] = checksum(space)
        self._words[at // 8] = len(space)
        self._spaces_end = end
        self._spaces.add(space)
        return True

    def keep_spaces(self, spaces: Sequence[bytes]) -> None:
        """Forget all others. Should the daemon be killed within this, it costs the chunks of those that follow."""
        if self._spaces == set(spaces):
            return
        self._words[_SPACES // 8] = 0
        self._spaces_end, self._spaces = _SPACES, set()
        for space in spaces:
            self.save_space(space)

    # Recovery

    def _read_slots(self, descriptor: int, sizes: list[int]) -> list[Recovered]:
        """All extents, if all are sound: one that is not may be anywhere, with a client that writes to it."""
        slots, ats = _used_slots(descriptor, self._slots)
        place, body = slots[:, 0], slots[:, 1] >> np.uint64(_CHECK_BITS)
        check = slots[:, 1] & np.uint64(_CHECK)
        segment, units = place >> np.uint64(SEGMENT_SHIFT - _UNIT_BITS), body >> np.uint64(_SIZE_AT)
        state = body & np.uint64(_STATES)
        known = segment < len(sizes)
        room = np.array(sizes, dtype=np.uint64)[np.where(known, segment, 0)] >> np.uint64(_UNIT_BITS)
        end = (place & np.uint64(_OFFSET_MASK)) + units
        sound = known & (check == (place + body) % np.uint64(_PRIME)) & (units > 0) & (end <= room)
        sound &= (state == _BUSY) | (state == _SEALED)
        if not sound.all():
            raise ControlBroken(f"{np.count_nonzero(~sound)} of its {len(slots)} extents are damaged")
        order = np.argsort(place)
        place, units, state, body, ats = place[order], units[order], state[order], body[order], ats[order]
        if (place[:-1] + units[:-1] > place[1:]).any():
            raise ControlBroken("extents overlap")
        addresses = (place << np.uint64(_UNIT_BITS)).tolist()
        self._slot_of = ByAddress(zip(addresses, ats.tolist(), strict=True))
        nbytes = (units << np.uint64(_UNIT_BITS)).tolist()
        states = [ExtentState.BUSY if value == _BUSY else ExtentState.SEALED for value in state.tolist()]
        leases = (body & np.uint64(_MOST_LEASES)).tolist()
        return list(map(Recovered._make, zip(addresses, nbytes, states, leases, strict=True)))

    def _read_clients(self) -> list[RecoveredClient]:
        """All clients, if all are sound: whose process is not known may write for ever."""
        for at in range(_CLIENTS // 8, _SPACES // 8, _CLIENT_BYTES // 8):
            row = bytes(self._bytes[at * 8 : at * 8 + _CLIENT_FIELDS.size])
            if mark := self._words[at + len(row) // 8]:
                if mark != _mark(row):
                    raise ControlBroken("its list of clients is damaged")
                self._clients[row] = at
        return [RecoveredClient(*_CLIENT_FIELDS.unpack(row)) for row in self._clients]

    def _read_spaces(self) -> list[bytes]:
        """Those that are whole. A lost one costs its chunks, and nothing else."""
        spaces, at = [], _SPACES
        while at < _SLOTS and (length := self._words[at // 8]):
            end = _end_of_space(at, length)
            if end > _SLOTS:
                _log.warning("the pool's list of spaces is damaged; what follows in it is lost")
                break
            space = bytes(self._bytes[at + 16 : at + 16 + length])
            if checksum(space) == self._words[at // 8 + 1]:
                spaces.append(space)
            else:
                _log.warning("one of the pool's spaces is damaged; its chunks are lost")
            at = end
        self._spaces_end = at
        return spaces


def write_control(descriptor: int, geometry: Geometry) -> None:
    """Fill a new control file, of full size and zeros."""
    fixed = _FIXED.pack(_MAGIC, _VERSION, geometry.pool_bytes, geometry.segment_bytes)
    os.pwrite(descriptor, fixed + struct.pack("=Q", checksum(fixed)), 0)


def read_geometry(descriptor: int) -> Geometry:
    """What the control file says that the pool is.

    Raises:
        ControlBroken: it is none, or damaged.
        BackendFormatError: it was written by another version.
    """
    start = os.pread(descriptor, _FIXED.size + 8, 0)
    if len(start) < _FIXED.size + 8 or struct.unpack_from("=Q", start, _FIXED.size)[0] != checksum(start[:-8]):
        raise ControlBroken("its first bytes are damaged")
    magic, version, pool_bytes, segment_bytes = _FIXED.unpack_from(start)
    if magic != _MAGIC:
        raise ControlBroken(f"its magic is {magic!r}, expected {_MAGIC!r}")
    if version != _VERSION:
        raise BackendFormatError(f"the pool has version {version}, this release reads version {_VERSION}")
    geometry = Geometry(pool_bytes, segment_bytes)
    if not is_complete(descriptor, geometry.control_bytes):
        raise ControlBroken(f"it has not the {geometry.control_bytes} bytes that it should have")
    return geometry


def _used_slots(descriptor: int, slots: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """The words ``[n, 2]`` of all slots that are not free, and where the second of each is.

    Read, not looked at in the mapping: most slots have never been used, and need not become resident.
    """
    found, places = [np.empty((0, 2), dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
    for first in range(0, slots, _SLOTS_READ):
        count = min(_SLOTS_READ, slots - first)
        piece = os.pread(descriptor, count * _SLOT_BYTES, _SLOTS + first * _SLOT_BYTES)
        words = np.frombuffer(piece, dtype=np.uint64).reshape(-1, 2)
        used = np.flatnonzero(words[:, 1])
        if len(used):
            found.append(words[used])
            places.append(_SLOTS // 8 + 1 + (used + first) * 2)
    return np.concatenate(found), np.concatenate(places)


def _mark(client: bytes) -> int:
    return checksum(client) | 1  # 0 = free


def _end_of_space(at: int, nbytes: int) -> int:
    return at + 16 + -(-nbytes // 8) * 8
