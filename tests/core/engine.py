"""A pretend engine: paged numpy KV memory that is written by an operation of its own, and what tests need around it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lmcache_sdk.api import Cache
from lmcache_sdk.connector import CopyTransfer, GPUConnector
from lmcache_sdk.keys import Chain
from lmcache_sdk.layout import KVLayout, Plane
from lmcache_sdk.spec import WHOLE, CellGrid, Group, GroupKind, KVSpec, Namespace, Part, Producer

LAYERS, HEADS, DIM, CHUNK, PAGE = 3, 4, 8, 8, 4
PRODUCER = Producer("numpy", "1", "cpu")


def namespace(
    *,
    fingerprint: str = "f",
    chunk_tokens: int = CHUNK,
    grid: CellGrid | None = None,
    dtype: str = "bfloat16",
) -> Namespace:
    group = Group("full", GroupKind.FULL, tuple(range(LAYERS)), HEADS, DIM, dtype)
    return Namespace(fingerprint, KVSpec((group,), chunk_tokens, grid or CellGrid()), label="numpy")


class PagedEngine:
    """uint16 ``[layer][k|v][page, token, head, dim]`` of one rank's heads."""

    def __init__(self, pages: int = 32, heads: tuple[int, int] = (0, HEADS), *, wrong: bool = False) -> None:
        self.first_head = heads[0]
        count = heads[1] - heads[0]
        self.kv = [[np.zeros((pages, PAGE, count, DIM), np.uint16) for _ in "kv"] for _ in range(LAYERS)]
        axes = ("page", "token", "head", "dim")
        planes = tuple(
            Plane.of(
                self.kv[layer][1 - at if wrong else at],
                axes,
                group="full",
                layer=layer,
                role=role,
                dtype="bfloat16",
            )
            for layer in range(LAYERS)
            for at, role in enumerate("kv")
        )
        self.layout = KVLayout(planes)
        self.part = WHOLE if count == HEADS else Part(heads=heads)

    def write(self, layer: int, slots: npt.NDArray[np.int64], k: npt.NDArray[np.uint8], v: object) -> None:
        assert isinstance(v, np.ndarray)
        for memory, rows in zip(self.kv[layer], (k, v), strict=True):
            memory[slots // PAGE, slots % PAGE] = rows.view(np.uint16).reshape(len(slots), -1, DIM)

    def compute(self, tokens: npt.NDArray[np.uint32], slots: npt.NDArray[np.int64]) -> None:
        """Fill slots with the KV of these tokens: a function of the whole prefix, as in a model."""
        state = np.cumsum(tokens.astype(np.uint64) * np.uint64(2654435761)) % np.uint64(65521)
        for layer in range(LAYERS):
            for at in range(2):
                memory = self.kv[layer][at]
                for slot, value in zip(slots, state, strict=True):
                    row = memory[slot // PAGE, slot % PAGE]
                    heads = np.arange(row.shape[0]) + self.first_head
                    row[:] = (int(value) + 31 * layer + 7 * at + heads[:, None] * 5 + np.arange(DIM)) % 65521

    def rows(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        return np.stack([m[slots // PAGE, slots % PAGE] for layer in self.kv for m in layer])

    def connect(self, cache: Cache, **arguments: int) -> GPUConnector:
        return GPUConnector(cache, self.layout, self.part, write_op=self.write, **arguments)


def tokens_of(seed: int, count: int) -> npt.NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 50_000, count).astype(np.uint32)


def slots_of(seed: int, count: int, pages: int = 32) -> npt.NDArray[np.int64]:
    """Slots of permuted pages."""
    ids = np.random.default_rng(seed).permutation(pages)
    return (ids[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:count].astype(np.int64)


def store(cache: Cache, engine: PagedEngine, connector: GPUConnector, tokens: npt.NDArray[np.uint32]) -> Chain:
    """Compute a prompt and store all its full chunks."""
    chain = Chain(tokens, CHUNK)
    slots = slots_of(1, len(tokens))
    engine.compute(tokens, slots)
    assert connector.store("store", chain, 0, slots[: len(chain) * CHUNK]).wait(10)
    return chain


def load(
    cache: Cache,
    connector: GPUConnector,
    tokens: npt.NDArray[np.uint32],
    slots: npt.NDArray[np.int64],
    rid: str = "load",
) -> tuple[int, CopyTransfer | None]:
    """What an adapter does: the number of chunks that came from the cache, and the transfer."""
    chain = Chain(tokens, CHUNK)
    cache.lookup(rid, chain)
    found = cache.wait(rid, 10)
    if not found.chunks:
        cache.forget(rid)
        return 0, None
    ticket = cache.claim(rid, found.chunks)
    assert ticket is not None
    transfer = connector.load(ticket, slots[: found.chunks * CHUNK])
    assert transfer.wait(10)
    cache.forget(rid)
    return found.chunks, transfer
