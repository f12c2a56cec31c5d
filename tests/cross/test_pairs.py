"""Each engine uses what the others have stored once they were seen to agree, and its reply is as good as by its own.

All engines compute one text, which is where their KV is compared. Each then stores a text of its own, and is asked to
go on with those of the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lmcache_adapters.hf import Model
from lmcache_sdk.api import LookupState
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import open_cache
from lmcache_sdk.sharing import BOUNDS
from lmcache_sdk.spec import Namespace, Producer
from lmcache_sdk.testing.harness import EngineHarness
from tests.core.served import Served
from tests.cross import kv, starts
from tests.cross.conftest import Text
from tests.cross.gates import MOST_K_ERROR, MOST_KL, MOST_V_ERROR, divergence, first_difference
from tests.cross.starts import CHUNK, NAMES

pytestmark = pytest.mark.timeout(240)  # engines start for half a minute

COMMON = 20 * CHUNK
STORED = 18 * CHUNK
QUESTION = 80  # what each reader goes on with, and so computes itself
NEW_TOKENS = 8
OWN_TEXT = {"hf": "compound", "vllm": "debugger", "hicache": "formatstrings", "linker": "specialnames"}
DOORS = {"hicache", "linker"}

Answer = dict[str, Any]


class Engines:
    """All of them on one daemon over a disk, after each has stored the common text and its own."""

    def __init__(self, directory: Path, text: Text, started: ExitStack) -> None:
        self.common = text("try", "with", "import", tokens=COMMON)
        # Every reader has a place of its own to read on from, so that nobody finds what another has added.
        longest = STORED + len(NAMES) * (QUESTION + 16)
        self.texts = {name: text(OWN_TEXT[name], tokens=longest) for name in NAMES}
        self.served = Served()
        started.callback(self.served.close)
        tier = f"lmdb://{self.served.folder}/store?size=1GiB"
        self.served.start("--tier", tier, pool="768MiB")
        self.engines = {name: starts.engine(name, directory, self.served.url, "verified") for name in NAMES}
        for engine in self.engines.values():
            started.callback(engine.kill)
        with ThreadPoolExecutor() as threads:
            list(threads.map(EngineHarness.start, self.engines.values()))
        for name, engine in self.engines.items():
            for ids in (self.common, self.texts[name][:STORED]):
                engine.generate(ids, 1)
                assert engine.flush()

    def prompt(self, author: str, reader: str) -> list[int]:
        """The text of one, with a question of the other behind it."""
        ids = self.texts[author]
        at = STORED + NAMES.index(reader) * (QUESTION + 16)
        return ids[:STORED] + ids[at : at + QUESTION]

    def run(self, name: str, ids: list[int], **fields: Any) -> Answer:
        """With nothing of it in the engine's own memory."""
        engine = self.engines[name]
        if name != "hf":
            assert engine.call("forget", 60)["forgotten"]
        return engine.generate(ids, NEW_TOKENS, logits=True, **fields)

    def run_behind_own(self, name: str, ids: list[int]) -> Answer:
        """With the stored part in the engine's own memory, computed by itself: under a salt that nobody else has."""
        engine, salt = self.engines[name], f"own {ids[-1]}"
        engine.generate(ids[:STORED], 1, cache_salt=salt)
        return engine.generate(ids, NEW_TOKENS, logits=True, cache_salt=salt)

    def exact(self, name: str) -> Any:
        """A client that sees what an engine has computed without the help of others."""
        namespace, producer = self.engines[name].hello["identity"]
        return open_cache(
            self.served.url,
            namespace=msgspec.convert(namespace, Namespace),
            producer=msgspec.convert(producer, Producer),
            share="own",
        )


@pytest.fixture(scope="module")
def engines(directory: Path, text: Text) -> Iterator[Engines]:
    with ExitStack() as started:
        yield Engines(directory, text, started)


@pytest.mark.parametrize("name", NAMES)
def test_each_finds_its_own(engines: Engines, name: str) -> None:
    reply = engines.run(name, engines.prompt(name, name), store=False)
    assert reply["cached_tokens"] == STORED


def test_all_have_one_namespace_and_each_engine_is_a_producer(engines: Engines) -> None:
    said = {name: engine.hello for name, engine in engines.engines.items()}
    assert len({hello["namespace"] for hello in said.values()}) == 1
    assert len({hello["producer"] for hello in said.values()}) == 3
    assert said["hicache"]["producer"] == said["linker"]["producer"]


def test_their_chunks_agree(engines: Engines) -> None:
    read = {}
    for name in NAMES:
        cache = engines.exact(name)
        read[name] = kv.read(cache, Chain(engines.common, CHUNK))
        cache.close()
        assert len(read[name]) == COMMON // CHUNK
    for one, other in itertools.combinations(NAMES, 2):
        k_error, v_error = kv.errors(read[one], read[other])
        k_head, v_head = kv.head_errors(read[one], read[other])
        print(f"{one} {other}: K {k_error:.4f} V {v_error:.4f}, of a head of a chunk up to {k_head:.4f} {v_head:.4f}")
        if {one, other} == DOORS:
            assert (k_error, v_error) == (0, 0)
        else:
            assert 0 < k_error < MOST_K_ERROR
            assert 0 < v_error < MOST_V_ERROR


def test_the_daemon_tells_who_agrees(engines: Engines) -> None:
    """Once for each two of the three producers."""
    producers = {frozenset((one, other)) for one, other in itertools.combinations(("hf", "vllm", "sglang"), 2)}
    pairs = engines.served.status()["stats"]["pairs"]
    assert {frozenset(name.split("-")[0] for name in pair["producers"]) for pair in pairs} == producers
    for pair in pairs:
        print(pair)
        assert (pair["state"], pair["failed"]) == ("open", 0)
        assert pair["compared"] >= 3
        assert pair["depth"] >= STORED
        assert 0 < pair["worst"]["k"] < BOUNDS["k"]
        assert 0 < pair["worst"]["v"] < BOUNDS["v"]


@pytest.mark.parametrize(("author", "reader"), list(itertools.permutations(NAMES, 2)))
def test_what_one_has_stored_the_other_uses(engines: Engines, model: Model, author: str, reader: str) -> None:
    ids = engines.prompt(author, reader)
    reply = engines.run(reader, ids)
    assert reply["cached_tokens"] == STORED
    if {author, reader} == DOORS:
        own = engines.run_behind_own(reader, ids)
        assert own["cached_details"]["device"] == STORED
        assert (reply["token_ids"], reply["top"]) == (own["token_ids"], own["top"])
        return
    own = engines.run(reader, ids, load=False, store=False)
    assert own["cached_tokens"] == 0
    found = divergence(dict(own["top"]), dict(reply["top"]))
    print(f"{author} -> {reader}: KL {found:.5f}, tokens {reply['token_ids']}, own {own['token_ids']}")
    assert found < MOST_KL
    if reply["token_ids"] != own["token_ids"]:
        margins = own["margins"] if reader != "hf" else _margins(model, ids, own["token_ids"])
        assert first_difference(own["token_ids"], reply["token_ids"], margins) is None


def test_what_builds_on_others_chunks_is_not_an_engines_own(engines: Engines) -> None:
    """After the test before: nothing that was read from others, or computed behind it, is exact."""
    for author, reader in itertools.permutations(NAMES, 2):
        if {author, reader} != DOORS:
            assert engines.engines[reader].flush()
            digests = Chain(engines.prompt(author, reader), CHUNK).digests()
            behind = digests[STORED // CHUNK :]
            assert behind
            cache = engines.exact(reader)
            for some in (digests, behind):
                found = cache.lookup("ask", Chain.from_digests(some, CHUNK))
                if found.state == LookupState.PENDING:
                    found = cache.wait("ask", 10)
                cache.forget("ask")
                assert (found.state, found.why != "no daemon") == (LookupState.MISS, True), (author, reader, found)
            cache.close()


def _margins(model: Model, ids: list[int], new: list[int]) -> list[float]:
    """How sure Transformers is of each token that it generates."""
    with torch.inference_mode():
        logits = model.network(torch.tensor([ids + new[:-1]]), logits_to_keep=len(new)).logits[0].float()
    best = logits.log_softmax(-1).topk(2).values
    return [float(first - second) for first, second in best]
