"""Daemon and engines killed at random under load: a short run of ``soak.py``."""

from __future__ import annotations

import os

import pytest

from tests.daemon.soak import soak

SEED = int(os.environ.get("LMCACHE_SDK_SEED", "20261124"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("lmdb", [False, True], ids=["memory", "memory over lmdb"])
def test_every_load_is_exact(lmdb: bool) -> None:
    print(f"seed {SEED}")
    totals = soak(14, SEED + lmdb, lmdb=lmdb)
    print(dict(totals))
    assert totals["daemon kills"] + totals["engine kills"] >= 12 and totals["loads"] > 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("lmdb", [False, True], ids=["memory", "memory over lmdb"])
def test_every_load_is_exact_for_long(lmdb: bool) -> None:
    print(f"seed {SEED}")
    print(dict(soak(100, SEED + 10 + lmdb, lmdb=lmdb)))
