"""Keys as names of objects, and back.

A key is a name and never a path, but servers that keep objects in folders make paths of names, and the client refuses
some: empty segments, ``.`` and ``..``. So ``!``, which no key has, marks what is not as it is in the key:

* a segment that is empty, ``.`` or ``..`` has it in front;
* a segment that is longer than a file's name may be is cut, and the pieces after the first have ``!!`` in front;
* the name ends in one, so that no object's name is another one's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_KEY = re.compile(r"[A-Za-z0-9._/-]*")
_LONGEST = 200  # folders' names may have 255


def name_of(key: str) -> str:
    """The object's name."""
    return "/".join(map(_written, key.split("/"))) + "!"


def folder_of(prefix: str) -> str:
    """The folder that has all objects whose key starts with ``prefix``; empty for that of all."""
    *folders, _ = prefix.split("/")
    return "/".join(map(_written, folders))


def key_of(name: str) -> str | None:
    """The key that an object is named for; None for what was put there by others."""
    key = "".join(_read(name.removesuffix("!")))[1:]
    return key if _KEY.fullmatch(key) and name_of(key) == name else None


def _written(segment: str) -> str:
    if segment in ("", ".", ".."):
        return f"!{segment}"
    return "/!!".join(segment[at : at + _LONGEST] for at in range(0, len(segment), _LONGEST))


def _read(name: str) -> Iterator[str]:
    for piece in name.split("/"):
        if piece.startswith("!!"):
            yield piece[2:]
        else:
            yield "/" + piece.removeprefix("!")
