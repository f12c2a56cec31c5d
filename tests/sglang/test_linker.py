"""The linker behind SGLang's own prefix cache, over its own pools, without an engine."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from lmcache_adapters.sglang import interface, weights
from lmcache_adapters.sglang.linker import Linker
from lmcache_sdk import connector
from lmcache_sdk.connector import GPUConnector
from lmcache_sdk.errors import ConfigError, LayoutError, LMCacheSDKError, UnsupportedError
from lmcache_sdk.keys import Chain
from tests.core.served import Served
from tests.daemon.daemon_process import until
from tests.sglang.pools import PAGE, Rank
from tests.sglang.tree import PAGES, Tree, prompt
from tests.vllm.tiny import LAYERS

PATIENT = {"lookup_timeout_s": 1.0}  # of tests that are not about time


@pytest.fixture
def trees() -> Iterator[list[Tree]]:
    """To be added to; each is closed in the end."""
    started: list[Tree] = []
    yield started
    for tree in started:
        tree.close()


@pytest.fixture
def tree(tiny_directory: Path, shared_daemon: Served, trees: list[Tree]) -> Tree:
    trees.append(Tree(tiny_directory, shared_daemon.url, extra=PATIENT))
    return trees[0]


def intercept(of: GPUConnector, name: str, instead: Callable[..., None]) -> Callable[[], None]:
    """Of the connector's copies; ``instead`` gets the original and its arguments. Returns what undoes it."""
    stream: Any = (of._loads if name == "scatter" else of._stores).stream
    original = getattr(stream, name)
    setattr(stream, name, lambda *given: instead(original, *given))
    return lambda: setattr(stream, name, original)


def keys_of(ids: list[int]) -> list[str]:
    return [digest.hex() for digest in Chain(ids, PAGE).digests()]


def leases(tree: Tree) -> int:
    return int(tree.linker._attached.cache.stats().leases)


@pytest.mark.timeout(180)  # SGLang compiles its hash on first use
@pytest.mark.parametrize("gone", ["forgotten", "evicted", "another process"])
def test_what_was_computed_is_loaded(
    tree: Tree, trees: list[Tree], tiny_directory: Path, shared_daemon: Served, gone: str
) -> None:
    ids = prompt(1 + len(gone), 5)
    computed = tree.compute(ids)
    tree.settle()
    request, result = tree.match(ids)
    assert (result.device_prefix_len, result.host_hit_length) == (5 * PAGE, 0)
    if gone == "forgotten":
        tree.forget()
    elif gone == "evicted":
        tree.evict()
    else:
        trees.append(Tree(tiny_directory, shared_daemon.url, extra=PATIENT))
        tree = trees[-1]
    request, result = tree.match(ids)
    assert (result.device_prefix_len, result.host_hit_length) == (0, 5 * PAGE)
    slots = tree.load(request)
    assert slots is not None and len(slots) == 5 * PAGE
    assert tree.forward([request]) == []
    assert torch.equal(tree.content(slots), computed)


def test_latent_rows(latent_directory: Path, shared_daemon: Served, trees: list[Tree]) -> None:
    trees.append(Tree(latent_directory, shared_daemon.url, latent=True, extra=PATIENT))
    ids = prompt(10, 3)
    computed = trees[0].compute(ids)
    trees[0].settle()
    trees[0].forget()
    request, _ = trees[0].match(ids)
    slots = trees[0].load(request)
    assert slots is not None
    assert trees[0].forward([request]) == []
    assert torch.equal(trees[0].content(slots), computed)


def test_the_hierarchical_cache_and_the_linker_share(
    tiny_directory: Path, shared_daemon: Served, trees: list[Tree], ranks: list[Rank]
) -> None:
    """Both ways, to the last bit, and by SGLang's own page keys."""
    ranks.append(rank := Rank(tiny_directory, shared_daemon.url))
    trees.append(tree := Tree(tiny_directory, shared_daemon.url, extra=PATIENT))
    theirs, ours = prompt(17, 3), prompt(18, 3)
    stored = rank.fill([1, 2, 3], seed=1)
    assert rank.set(keys_of(theirs), [1, 2, 3]) == [True] * 3
    request, result = tree.match(theirs)
    assert result.host_hit_length == 3 * PAGE
    slots = tree.load(request)
    assert slots is not None and tree.forward([request]) == []
    assert torch.equal(tree.content(slots), stored)

    computed = tree.compute(ours)
    tree.settle()
    assert rank.get(keys_of(ours), [7, 8, 9]) == [True] * 3
    assert torch.equal(rank.content([7, 8, 9]), computed)


def test_whose_kv_is_used(tiny_directory: Path, shared_daemon: Served, trees: list[Tree], stranger: Rank) -> None:
    """As by the other way in."""
    ids = prompt(19, 3)
    stored = stranger.fill([1, 2, 3], seed=1)
    assert stranger.set(keys_of(ids), [1, 2, 3], before=[]) == [True] * 3
    for share, pages in (("own", 0), ("verified", 0), ("any", 3)):
        trees.append(tree := Tree(tiny_directory, shared_daemon.url, extra={**PATIENT, "share": share}))
        request, result = tree.match(ids)
        assert result.host_hit_length == pages * PAGE
    slots = tree.load(request)
    assert slots is not None and tree.forward([request]) == []
    assert torch.equal(tree.content(slots), stored)


def test_a_tail_behind_what_the_device_has(tree: Tree) -> None:
    """And the same prefix for two requests of a batch, each in places of its own."""
    ids = prompt(20, 6)
    computed = tree.compute(ids)
    tree.settle()
    tree.forget()
    request, _ = tree.match(ids[: 2 * PAGE])
    front = tree.load(request)
    assert front is not None and tree.forward([request]) == []
    tree.insert(ids[: 2 * PAGE], front)

    pair = [tree.match(ids) for _ in range(2)]
    assert [(result.device_prefix_len, result.host_hit_length) for _, result in pair] == [(2 * PAGE, 4 * PAGE)] * 2
    places = [tree.load(request) for request, _ in pair]
    assert tree.forward([request for request, _ in pair]) == []
    assert not set(places[0].tolist()) & set(places[1].tolist())
    for slots in places:
        assert torch.equal(tree.content(slots), computed[:, 2 * PAGE :])


def test_what_was_loaded_is_not_stored_again(tiny_directory: Path, served: Served, trees: list[Tree]) -> None:
    trees.append(tree := Tree(tiny_directory, served.url, extra=PATIENT))
    ids = prompt(30, 4)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    before = tree.linker._attached.cache.stats().pool.used_bytes
    gathered: list[Any] = []
    intercept(tree.linker._attached.storer, "gather", lambda *given: gathered.append(given))
    request, _ = tree.match(ids)
    slots = tree.load(request)
    assert slots is not None and tree.forward([request]) == []
    tree.insert(ids, slots)
    assert tree.cache.linker.pending_offloads  # SGLang offers them
    tree.settle()
    assert (gathered, tree.linker._attached.cache.stats().pool.used_bytes) == ([], before)


def test_a_request_that_was_asked_for_a_moment_ago_is_not_asked_for_again(tree: Tree) -> None:
    ids = prompt(40, 4)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    asked: list[str] = []
    finder = tree.linker._attached.finder
    lookup = finder._lookup
    finder._lookup = lambda rid, *rest: (asked.append(rid), lookup(rid, *rest))[1]
    for _ in range(5):
        assert tree.match(ids, "one")[1].host_hit_length == 4 * PAGE
        assert tree.match(prompt(41, 2), "none")[1].host_hit_length == 0
    assert sorted(asked) == ["none", "one"]


def test_layer_by_layer(
    tiny_directory: Path, shared_daemon: Served, trees: list[Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward of a layer begins while later ones are being copied."""
    monkeypatch.setattr(connector, "STEP_BYTES", 1)  # the layers of a tiny model are copied at once otherwise
    trees.append(tree := Tree(tiny_directory, shared_daemon.url, extra=PATIENT))
    ids = prompt(50, 3)
    computed = tree.compute(ids)
    tree.settle()
    tree.forget()
    loader = tree.linker._attached.loader
    assert [step.layers for step in loader._steps] == [(layer,) for layer in range(LAYERS)]
    gates = [threading.Event() for _ in range(LAYERS)]

    def scatter(copy: Callable[..., None], planes: Any, *rest: Any) -> None:
        assert gates[planes[0].layer].wait(10)
        copy(planes, *rest)

    intercept(loader, "scatter", scatter)
    request, _ = tree.match(ids)
    slots = tree.load(request)
    assert slots is not None
    tree.linker.layer_done_counter.set_consumer(tree.cache.ready_to_load_host_cache())
    for layer, gate in enumerate(gates):
        gate.set()
        found = tree.pool.get_key_buffer(layer)[slots], tree.pool.get_value_buffer(layer)[slots]
        assert torch.equal(found[0], computed[layer]) and torch.equal(found[1], computed[LAYERS + layer])
        assert layer == LAYERS - 1 or not tree.linker.layer_done_counter._batches[0].transfers[0].done()
    assert tree.cache.finish_external_linker_loads([request]) == []


def test_an_aborted_request_gives_its_lease_back(tiny_directory: Path, served: Served, trees: list[Tree]) -> None:
    trees.append(tree := Tree(tiny_directory, served.url, extra=PATIENT))
    ids = prompt(60, 4)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    free = tree.allocator.available_size()
    request, _ = tree.match(ids)
    assert tree.load(request) is not None
    assert leases(tree) == 1
    tree.cache.linker.release_request(request.rid)
    until(lambda: leases(tree) == 0, 10.0, "the end of the lease")
    assert tree.cache.ready_to_load_host_cache() == -1
    assert tree.allocator.available_size() == free - 4 * PAGE  # SGLang frees them with the request

    request, _ = tree.match(ids)
    assert tree.load(request) is not None
    tree.forget()
    until(lambda: leases(tree) == 0, 10.0, "the end of the lease")
    assert tree.match(ids)[1].host_hit_length == 4 * PAGE


# Trouble


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
@pytest.mark.parametrize("when", ["looked up", "taken", "under way"])
def test_the_daemon_is_lost(tiny_directory: Path, served: Served, trees: list[Tree], how: int, when: str) -> None:
    """Before ``load`` has said True the prefix is computed; after it, it arrives. Nothing is aborted, and when the
    daemon is back there are hits again.
    """
    trees.append(tree := Tree(tiny_directory, served.url))
    ids = prompt(70, 4)
    computed = tree.compute(ids)
    tree.settle()
    tree.forget()
    assert served.process is not None
    tree.linker._attached.finder._timeout_s = 1.0
    request, result = tree.match(ids)
    tree.linker._attached.finder._timeout_s = 0.05
    assert result.host_hit_length == 4 * PAGE
    slots = None
    if when != "looked up":
        slots = tree.load(request)
        assert slots is not None
    if when == "under way":
        tree.linker.layer_done_counter.set_consumer(tree.cache.ready_to_load_host_cache())
    free = tree.allocator.available_size()
    served.process.send_signal(how)
    began = time.monotonic()
    if when == "looked up":
        assert tree.load(request) is None
        assert tree.allocator.available_size() == free
    if when == "taken":  # and known to be lost
        assert tree.match(prompt(73, 1))[1].host_hit_length == 0
        until(lambda: not tree.linker._attached.cache.connected, 2.0, "that it is missed")
    failed = tree.forward([request]) if when != "under way" else tree.cache.finish_external_linker_loads([request])
    assert failed == []
    if slots is not None:
        assert torch.equal(tree.content(slots), computed)
    others = [tree.match(prompt(100 + number, 4))[1].host_hit_length for number in range(20)]
    assert others == [0] * 20
    tree.compute(prompt(71, 2))
    tree.settle()
    assert time.monotonic() - began < 2.0

    if how == signal.SIGKILL:
        served.process.wait(20)
        served.start(pool="32MiB")
    else:
        served.process.send_signal(signal.SIGCONT)
    until(lambda: tree.linker._attached.cache.connected, 20.0, "that the daemon is reached")
    tree.linker._attached.finder._timeout_s = 1.0
    again = tree.compute(prompt(72, 2))
    tree.settle()
    tree.forget()
    request, result = tree.match(prompt(72, 2))
    assert result.host_hit_length == 2 * PAGE
    slots = tree.load(request)
    assert slots is not None and tree.forward([request]) == []
    assert torch.equal(tree.content(slots), again)


def test_a_slow_answer_is_a_miss(tree: Tree) -> None:
    """The scheduler waits as long as agreed for the first, and not at all for those that come while it is late."""
    ids = prompt(80, 2)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    finder = tree.linker._attached.finder
    go_on = threading.Event()
    lookup = finder._lookup
    finder._lookup = lambda *given: (go_on.wait(20), lookup(*given))[1]
    finder._timeout_s = 0.05
    began = time.monotonic()
    assert tree.match(ids, "first")[1].host_hit_length == 0
    assert 0.05 <= time.monotonic() - began < 1.0
    began = time.monotonic()
    assert [tree.match(ids)[1].host_hit_length for _ in range(50)] == [0] * 50
    assert time.monotonic() - began < 0.5
    go_on.set()
    finder._timeout_s = 1.0
    until(lambda: tree.match(ids)[1].host_hit_length == 2 * PAGE, 10.0, "a hit")


@pytest.mark.parametrize("fault", ["lookup", "claim", "take", "segments", "reserve"])
def test_an_error_in_the_cache_is_computed(tree: Tree, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    ids = prompt(90 + len(fault), 3)
    if fault == "reserve":
        _break(tree, monkeypatch, fault)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    if fault != "reserve":
        _break(tree, monkeypatch, fault)
    free = tree.allocator.available_size()
    request, result = tree.match(ids)
    loadable = fault in ("claim", "take", "segments")
    assert result.host_hit_length == (3 * PAGE if loadable else 0)
    assert tree.load(request) is None
    assert tree.allocator.available_size() == free
    assert tree.forward([request]) == []


def _break(tree: Tree, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{name} is broken")

    monkeypatch.setattr(tree.linker._attached.cache, name, fail)


def test_a_copy_that_fails_aborts_its_batch_and_nothing_else(tree: Tree) -> None:
    """It was promised: SGLang can only abort. What was not written is never used."""
    ids = prompt(110, 2)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    loader = tree.linker._attached.loader
    request, _ = tree.match(ids)
    assert tree.load(request) is not None

    def fail(*_: Any) -> None:
        raise LayoutError("no")

    undo = intercept(loader, "scatter", fail)
    assert tree.forward([request]) == [request]
    undo()
    request, _ = tree.match(ids)
    assert tree.load(request) is not None
    assert tree.forward([request]) == []


def test_a_copy_that_hangs_is_waited_for_no_longer_than_agreed(tree: Tree) -> None:
    ids = prompt(111, 4)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    loader = tree.linker._attached.loader
    go_on, written = threading.Event(), []

    def scatter(copy: Callable[..., None], *given: Any) -> None:
        written.append(given)
        assert go_on.wait(20)
        copy(*given)

    intercept(loader, "scatter", scatter)
    tree.linker.layer_done_counter._timeout_s = 0.1
    request, _ = tree.match(ids)
    assert tree.load(request) is not None
    began = time.monotonic()
    tree.linker.layer_done_counter.set_consumer(tree.cache.ready_to_load_host_cache())
    for layer in range(LAYERS):
        tree.pool.get_key_buffer(layer)
    assert time.monotonic() - began < 1.0
    threading.Timer(0.2, go_on.set).start()  # what is being written must have ended before the places are given away
    assert tree.cache.finish_external_linker_loads([request]) == [request]
    assert go_on.is_set() and len(written) == 1


def test_new_weights_end_the_cache(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(120, 2)
    tree.compute(ids)
    tree.settle()
    tree.forget()
    monkeypatch.setattr(weights, "_replaced", threading.Event())
    request, result = tree.match(ids)
    assert result.host_hit_length == 2 * PAGE
    weights.note_update()
    assert tree.load(request) is None
    assert tree.match(ids)[1].host_hit_length == 0
    tree.compute(prompt(121, 2))
    tree.settle()
    tree.forget()
    monkeypatch.undo()
    assert tree.match(prompt(121, 2))[1].host_hit_length == 0


def test_offloads_are_told_in_their_order(tree: Tree) -> None:
    """And a reset, after which SGLang uses all memory otherwise, waits for what is being read."""
    storer = tree.linker._attached.storer
    go_on, read = threading.Event(), []

    def gather(copy: Callable[..., None], *given: Any) -> None:
        read.append(given)
        assert go_on.wait(20)
        copy(*given)

    intercept(storer, "gather", gather)
    tree.compute(prompt(130, 2))
    tree.compute(prompt(131, 2))
    until(lambda: read, 10.0, "the first gather")
    assert tree.linker.num_completed_offloads() == 0
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    tree.forget()
    assert go_on.is_set() and storer.drain(10)
    assert len(read) == 1
    assert (tree.linker.num_completed_offloads(), len(tree.cache.linker.pending_offloads)) == (0, 0)
    assert tree.match(prompt(131, 2))[1].host_hit_length == 0  # it had not been begun


def test_a_load_does_not_wait_for_a_store(tree: Tree) -> None:
    """They share no place: SGLang gives none away that is being stored, though it needs room."""
    ids, others = prompt(170, 4), prompt(171, 4)
    computed = tree.compute(ids)
    tree.settle()
    tree.forget()
    go_on, read = threading.Event(), []

    def gather(copy: Callable[..., None], *given: Any) -> None:
        read.append(given)
        assert go_on.wait(20)
        copy(*given)

    undo = intercept(tree.linker._attached.storer, "gather", gather)
    kept = tree.compute(others)
    until(lambda: read, 10.0, "the first gather")
    tree.evict()
    _, result = tree.match(others)
    assert result.device_prefix_len == 4 * PAGE
    request, _ = tree.match(ids)
    slots = tree.load(request)
    assert slots is not None and tree.forward([request]) == []
    assert torch.equal(tree.content(slots), computed)
    go_on.set()
    undo()
    tree.settle()
    tree.evict()
    request, result = tree.match(others)
    assert (result.device_prefix_len, result.host_hit_length) == (0, 4 * PAGE)
    slots = tree.load(request)
    assert slots is not None and tree.forward([request]) == []
    assert torch.equal(tree.content(slots), kept)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": (ComponentType.FULL, ComponentType.SWA)}, "KV of kind swa are not served"),
        ({"components": (ComponentType.FULL, ComponentType.MAMBA)}, "KV of kind mamba are not served"),
        ({"before": lambda pool: setattr(pool, "kv_cache_layout", "hnd")}, "layout 'hnd'; served is 'nhd'"),
        ({"before": lambda pool: setattr(pool, "start_layer", 2)}, "4 layers from 2 on"),
        ({"before": lambda pool: setattr(pool, "device", "cuda:0")}, "KV on cuda:0"),
        ({"before": lambda pool: setattr(pool, "dtype", torch.float8_e4m3fn)}, "KV of dtype 'float8_e4m3fn'"),
        ({"extra": {"chunk_tokens": 16}}, "start it with --page-size 16"),
        ({"extra": {"lookup_timeout_s": 0}}, "lookup_timeout_s is a number of seconds up to 2, got 0"),
        ({"extra": {"share": "all"}}, "share must be one of verified, any, own, got 'all'"),
        ({"extra": {"lookup": 1}}, "unknown setting 'lookup' in linker_extra_config"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_what_is_not_served(tiny_directory: Path, shared_daemon: Served, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedError, ConfigError), match=message):
        Tree(tiny_directory, shared_daemon.url, **changes)


DRAFT = {"speculative_eagle_topk": 1, "speculative_num_steps": 2, "speculative_num_draft_tokens": 3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}, "DP attention is not served"),
        ({"attn_dp_size": 2, "tp_size": 2}, "DP attention is not served"),
        ({"pp_size": 2}, "pipeline parallelism is not served"),
        ({"disaggregation_mode": "prefill"}, "prefill and decode apart are not served"),
        ({"speculative_algorithm": "EAGLE", **DRAFT}, "speculative decoding is not served"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_flags_that_are_not_served(
    tiny_directory: Path, shared_daemon: Served, flags: dict[str, Any], message: str
) -> None:
    """As SGLang resolves them, which has other names for some."""
    if "speculative_algorithm" in flags:
        flags = {**flags, "speculative_draft_model_path": str(tiny_directory)}
    with pytest.raises(UnsupportedError, match=message):
        Tree(tiny_directory, shared_daemon.url, **flags)


def test_another_kind_of_memory(tiny_directory: Path, shared_daemon: Served) -> None:
    def rename(pool: Any) -> None:
        pool.__class__ = type("PageMajorMHATokenToKVPool", (type(pool),), {})

    with pytest.raises(UnsupportedError, match=r"kind PageMajorMHATokenToKVPool .* served is MHATokenToKVPool"):
        Tree(tiny_directory, shared_daemon.url, before=rename)


def test_memory_that_lies_otherwise_fails_its_proof(tiny_directory: Path, shared_daemon: Served) -> None:
    def swap(pool: Any) -> None:
        pool.k_buffer, pool.v_buffer = pool.v_buffer, pool.k_buffer
        write = pool._store_kv_layer
        pool._store_kv_layer = lambda layer, places, k, v: write(layer, places, v, k)

    with pytest.raises(LayoutError, match="does not read what the engine wrote"):
        Tree(tiny_directory, shared_daemon.url, before=swap)


def test_degrades_unless_told_to_refuse(
    tiny_directory: Path, shared_daemon: Served, trees: list[Tree], caplog: pytest.LogCaptureFixture
) -> None:
    components = (ComponentType.FULL, ComponentType.SWA)
    trees.append(tree := Tree(tiny_directory, shared_daemon.url, extra={"on_error": "degrade"}, components=components))
    assert "SGLang serves WITHOUT the cache: UnsupportedError: models with KV of kind swa" in caplog.text
    ids = prompt(140, 2)
    tree.compute(ids)
    tree.settle()
    assert tree.match(ids)[1].device_prefix_len == 2 * PAGE
    tree.forget()
    request, result = tree.match(ids)
    assert result.host_hit_length == 0 and tree.load(request) is None
    assert tree.forward([request]) == []


def test_no_daemon_is_no_cache(tiny_directory: Path, tmp_path: Path, trees: list[Tree]) -> None:
    trees.append(tree := Tree(tiny_directory, f"unix://{tmp_path}/none"))
    ids = prompt(150, 2)
    tree.compute(ids)
    tree.settle()
    assert tree.match(ids)[1].device_prefix_len == 2 * PAGE  # and is not locked for ever
    tree.evict()
    assert tree.allocator.available_size() == PAGES * PAGE
    began = time.monotonic()
    assert [tree.match(ids)[1].host_hit_length for _ in range(100)] == [0] * 100
    assert time.monotonic() - began < 0.5


def test_a_store_of_its_own(tiny_directory: Path, tmp_path: Path, trees: list[Tree]) -> None:
    url, ids = f"lmdb://{tmp_path}/kv?size=32MiB", prompt(160, 3)
    first = Tree(tiny_directory, url, extra={"pool_bytes": "8MiB", **PATIENT})
    computed = first.compute(ids)
    first.settle()
    first.close()
    trees.append(tree := Tree(tiny_directory, url, extra={"pool_bytes": "8MiB", **PATIENT}))
    request, result = tree.match(ids)
    assert result.host_hit_length == 3 * PAGE
    slots = tree.load(request)
    assert slots is not None and tree.forward([request]) == []
    assert torch.equal(tree.content(slots), computed)


# Drift


def test_the_interface_is_the_one_that_is_served() -> None:
    assert interface.linker_base() is Linker.__mro__[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: setattr(base, "prefetch", lambda self, rid: None), "prefetch is new"),
        (lambda base: delattr(base, "cancel_queued_load"), "cancel_queued_load is gone"),
        (lambda base: setattr(base, "lookup", lambda self, rid, transfers, deadline: []), "takes .rid, transfers, d"),
    ],
    ids=["new", "gone", "changed"],
)
def test_another_interface_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], message: str
) -> None:
    base = interface.linker_base()
    other = type("UnifiedCacheLinker", (), {name: vars(base)[name] for name in interface.CALLED})
    change(other)
    abstract = {*base.__abstractmethods__, *(["prefetch"] if hasattr(other, "prefetch") else [])}
    other.__abstractmethods__ = frozenset(abstract)  # type: ignore[attr-defined]
    monkeypatch.setattr(interface.importlib, "import_module", lambda name: SimpleNamespace(UnifiedCacheLinker=other))
    with pytest.raises(UnsupportedError, match=rf"linker of SGLang 0\.5\.23 .*{message}.*HiCacheBackend"):
        interface.linker_base()


def test_a_version_without_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(interface.importlib, "import_module", absent)
    monkeypatch.setattr(interface.metadata, "version", lambda name: "0.5.15")
    with pytest.raises(LMCacheSDKError, match=r"SGLang 0\.5\.15 has no external cache linker .*HiCacheBackend"):
        interface.linker_base()
