"""``lmdb:///path?size=50GiB``: records on a local disk, bounded, surviving restarts.

``home`` owns the directory (format, lock, marker of a clean close), ``environment`` opens LMDB in it and
distrusts what a crash left, ``backend`` stores and evicts.
"""

from lmcache_backends.lmdb.backend import LMDBBackend

__all__ = ["LMDBBackend"]
