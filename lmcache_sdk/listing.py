"""What the keys that a store lists are names of. A store may be shared: not all are this program's."""

from __future__ import annotations

import re
from typing import NamedTuple

from lmcache_sdk.packs import split_key

# The three forms of a key: a namespace's manifest, a producer's manifest, a record.
_KEY = re.compile(
    r"(?P<namespace>[0-9a-f]{32})/(?:manifest|(?P<producer>[0-9a-f]{16})/(?:manifest|"
    r"(?P<fidelity>[\w.-]+)/(?P<digest>[0-9a-f]{64})/(?P<group>[\w.-]+)/(?P<cell>[\w.-]+)))",
    re.ASCII,
)


class Key(NamedTuple):
    """The parts of a key; those that a manifest's key does not have are empty. ``size``: chunks in the record."""

    namespace: str
    producer: str
    fidelity: str
    digest: str
    group: str
    cell: str
    size: int = 1

    @property
    def is_manifest(self) -> bool:
        return not self.digest


def parse_key(text: str) -> Key | None:
    """None if it is no key of ours."""
    text, size = split_key(text)
    match = _KEY.fullmatch(text)
    return Key._make([*(match[name] or "" for name in Key._fields[:-1]), size]) if match else None
