"""Keys against an implementation of their own, written from ``docs/key-format.md`` and not from the code."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_sdk import keys
from lmcache_sdk.backend import KEY_LIMIT
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.keys import Chain, Origin, Overlay, as_tokens, key_text, manifest_key, request_seed
from lmcache_sdk.spec import Namespace, Producer

SPECIFICATION = Path(__file__).resolve().parents[2] / "docs" / "key-format.md"

token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=60)
salts = st.none() | st.text(st.characters(codec="utf-8"), max_size=20)


def vectors(name: str) -> Any:
    """A fenced block of the specification that is marked ``json NAME``."""
    found = re.findall(rf"^```json {name}\n(.*?)^```$", SPECIFICATION.read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return json.loads(found[0])


def seed_of(extra_key: str | None, cache_salt: str | None) -> bytes:
    """What SGLang does: nothing without either; else a digest over a tag and both parts, each length-prefixed."""
    if extra_key is None and cache_salt is None:
        return b""
    sha = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, cache_salt):
        if part is None:
            sha.update(b"\x00")
        else:
            encoded = part.encode("utf-8")
            sha.update(b"\x01")
            sha.update(struct.pack("<Q", len(encoded)))
            sha.update(encoded)
    return sha.digest()


def digests_of(
    tokens: list[int],
    chunk_tokens: int,
    extra_key: str | None = None,
    cache_salt: str | None = None,
    overlays: list[tuple[int, int, str]] = [],  # noqa: B006
) -> list[bytes]:
    """The chain, token by token."""
    digests = []
    predecessor = seed_of(extra_key, cache_salt)
    for first in range(0, len(tokens) - chunk_tokens + 1, chunk_tokens):
        message = predecessor
        for token in tokens[first : first + chunk_tokens]:
            message += struct.pack("<I", token)
        positions = set(range(first, first + chunk_tokens))
        here = [o for o in sorted(overlays) if positions & set(range(o[0], o[1]))]
        if here:
            message += b"lmcache-sdk-overlay-v1"
        for start, end, identifier in here:
            encoded = identifier.encode("utf-8")
            message += struct.pack("<qqQ", start - first, end - first, len(encoded)) + encoded
        predecessor = hashlib.sha256(message).digest()
        digests.append(predecessor)
    return digests


# Digests


@given(token_lists, st.integers(1, 9), salts, salts)
def test_digests_are_those_of_the_specification(
    tokens: list[int], chunk_tokens: int, extra_key: str | None, cache_salt: str | None
) -> None:
    chain = Chain(tokens, chunk_tokens, extra_key=extra_key, cache_salt=cache_salt)
    expected = digests_of(tokens, chunk_tokens, extra_key, cache_salt)
    assert len(chain) == len(expected) == len(tokens) // chunk_tokens
    assert chain.digests() == expected


@given(token_lists, st.integers(1, 9), st.data())
def test_the_order_of_asking_does_not_matter(tokens: list[int], chunk_tokens: int, data: st.DataObject) -> None:
    chain = Chain(tokens, chunk_tokens)
    expected = digests_of(tokens, chunk_tokens)
    furthest = 0
    for count in data.draw(st.lists(st.integers(0, 70), max_size=8)):
        assert chain.digests(count) == expected[:count]
        furthest = max(furthest, min(count, len(chain)))
        assert chain.hashed == furthest, "only what was asked for is hashed"


@given(token_lists, st.lists(token_lists, max_size=4), st.integers(1, 9), salts)
def test_extending_is_the_same_as_having_known(
    tokens: list[int], more: list[list[int]], chunk_tokens: int, cache_salt: str | None
) -> None:
    chain = Chain(tokens, chunk_tokens, cache_salt=cache_salt)
    for piece in more:
        before = chain.digests()
        chain.extend(piece)
        assert chain.hashed == len(before), "extending hashes nothing"
        assert chain.digests(len(before)) == before
    assert chain.digests() == digests_of(list(itertools.chain(tokens, *more)), chunk_tokens, None, cache_salt)


def test_each_chunk_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def copy() -> Any:
        calls.append(1)
        return hashlib.sha256()

    monkeypatch.setattr(keys, "_EMPTY", SimpleNamespace(copy=copy))
    chain = Chain(range(1000), 10)
    assert not calls, "constructing hashes nothing"
    assert len(chain.digests(1)) == 1 and len(calls) == 1
    chain.digests(30)
    chain.digests(30)
    chain.digests(7)
    assert len(calls) == 30
    chain.extend(range(15))
    chain.digests()
    assert len(calls) == 101


def test_a_prefix_is_shared_and_what_follows_a_change_is_not() -> None:
    tokens = list(range(64))
    changed = [*tokens[:20], 999, *tokens[21:]]
    ours, theirs = Chain(tokens, 8).digests(), Chain(changed, 8).digests()
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True] * 2 + [False] * 6


def test_chunks_of_equal_tokens_differ_by_what_precedes_them() -> None:
    digests = Chain([7] * 64, 8).digests()
    assert len(set(digests)) == 8


def test_hashing_is_thread_safe() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 20_000).astype(np.uint32)
    expected = Chain(tokens, 4).digests()
    for _ in range(5):
        chain = Chain(tokens, 4)
        start, wrong = threading.Barrier(8), []

        def ask(step: int, chain: Chain = chain, start: Any = start, wrong: list[int] = wrong) -> None:
            start.wait()
            counts = range(step, len(expected) + step, step)
            wrong.extend(count for count in counts if chain.digests(count) != expected[:count])

        threads = [threading.Thread(target=ask, args=(step,)) for step in (97, 131, 250, 251, 499, 997, 2500, 5000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert chain.digests() == expected and chain.hashed == len(expected)


def test_hashing_while_the_chain_grows() -> None:
    tokens = list(range(8000))
    chain = Chain(tokens[:4000], 4)
    grown, wrong = threading.Event(), []
    expected = digests_of(tokens, 4)

    def ask() -> None:
        while not grown.is_set() or chain.hashed < len(expected):
            found = chain.digests(chain.hashed + 3)
            if found != expected[: len(found)]:
                wrong.append(len(found))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for at in range(4000, 8000, 10):
        chain.extend(tokens[at : at + 10])
    grown.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert chain.digests() == expected


# Seeds


@given(salts, salts)
def test_seeds_are_framed_as_sglang_frames_them(extra_key: str | None, cache_salt: str | None) -> None:
    assert request_seed(extra_key=extra_key, cache_salt=cache_salt) == seed_of(extra_key, cache_salt)


def test_no_two_requests_share_a_seed_by_accident() -> None:
    cases = [
        (None, None), (None, ""), ("", None), ("", ""), ("a", None), (None, "a"), ("a", ""), ("", "a"),
        ("a", "b"), ("ab", ""), ("", "ab"), ("a\0", "b"), ("b", "a"),
    ]  # fmt: skip
    seeds = {request_seed(extra_key=extra, cache_salt=salt) for extra, salt in cases}
    assert len(seeds) == len(cases)
    firsts = {Chain(range(8), 8, extra_key=extra, cache_salt=salt).digests()[0] for extra, salt in cases}
    assert len(firsts) == len(cases)


def test_the_tenant_is_not_part_of_the_key() -> None:
    assert Chain(range(8), 8, tenant="a").digests() == Chain(range(8), 8, tenant="b").digests()


def test_a_salt_that_has_no_utf8_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be part of a key"):
        Chain(range(8), 8, cache_salt="\ud800")


# Overlays

overlay_lists = st.lists(
    st.tuples(st.integers(0, 70), st.integers(1, 30), st.text(st.characters(codec="utf-8"), max_size=5)), max_size=4
).map(lambda found: [(start, start + length, identifier) for start, length, identifier in found])


@given(token_lists, st.integers(1, 9), overlay_lists, st.randoms())
def test_overlays_are_those_of_the_specification(
    tokens: list[int], chunk_tokens: int, overlays: list[tuple[int, int, str]], random: Any
) -> None:
    shuffled = [Overlay(*overlay) for overlay in random.sample(overlays, len(overlays))]
    chain = Chain(tokens, chunk_tokens, overlays=shuffled)
    assert chain.digests(3) == digests_of(tokens, chunk_tokens, overlays=overlays)[:3]
    assert chain.digests() == digests_of(tokens, chunk_tokens, overlays=overlays)


@pytest.mark.parametrize(
    ("start", "end", "shared"),
    [(0, 1, 0), (7, 8, 0), (8, 9, 1), (20, 30, 2), (31, 33, 3), (63, 70, 7), (64, 90, 8)],
)
def test_chunks_before_an_image_stay_shared(start: int, end: int, shared: int) -> None:
    tokens = list(range(64))
    plain = Chain(tokens, 8).digests()
    with_image = Chain(tokens, 8, overlays=[Overlay(start, end, "cat.png")]).digests()
    assert [a == b for a, b in zip(plain, with_image, strict=True)] == [True] * shared + [False] * (8 - shared)


def test_another_image_in_the_same_place_is_another_chunk() -> None:
    def last(start: int, end: int, identifier: str) -> bytes:
        return Chain(range(16), 8, overlays=[Overlay(start, end, identifier)]).digests()[-1]

    assert len({last(8, 12, "a"), last(8, 12, "b"), last(8, 13, "a"), last(9, 12, "a"), last(9, 12, "")}) == 5


def test_the_order_in_which_overlays_are_given_does_not_matter() -> None:
    overlays = [(2, 4, "b"), (2, 4, "a"), (1, 9, "c"), (2, 3, "d")]
    for given_order in itertools.permutations(overlays):
        chain = Chain(range(16), 8, overlays=[Overlay(*overlay) for overlay in given_order])
        assert chain.digests() == digests_of(list(range(16)), 8, overlays=overlays)


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (3, 3), (4, 3)])
def test_an_overlay_that_covers_nothing_is_refused(start: int, end: int) -> None:
    with pytest.raises(ConfigError, match=r"start \.\. end - 1"):
        Chain(range(8), 8, overlays=[Overlay(start, end, "a")])


# Tokens


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, 70_000],
        (1, 2, 70_000),
        np.array([1, 2, 70_000], np.int64),
        np.array([1, 2, 70_000], np.int32),
        np.array([1, 2, 70_000], "<u4"),
        np.array([1, 2, 70_000], ">u4"),
        np.array([1, 2, 70_000], np.uint64),
        np.array([1, 9, 2, 9, 70_000], np.uint32)[::2],
    ],
    ids=str,
)
def test_tokens_of_every_form_are_the_same(tokens: Any) -> None:
    found = as_tokens(tokens)
    assert found.dtype == np.dtype("<u4") and found.flags.c_contiguous
    assert found.tolist() == [1, 2, 70_000]
    assert Chain(tokens, 3).digests() == digests_of([1, 2, 70_000], 3)


def test_a_uint32_array_is_not_copied() -> None:
    tokens = np.arange(10, dtype=np.uint32)
    assert np.shares_memory(as_tokens(tokens), tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, -1], "-1"),
        ([2**32], "4294967296"),
        ([2**64], "within 0 .. 2\\*\\*32 - 1"),
        ([-(2**70)], "within 0 .. 2\\*\\*32 - 1"),
        (np.array([2**63], np.uint64), "9223372036854775808"),
        ([1.5], "float64"),
        (["a"], "within|integers"),
        ([True, False], "bool"),
        ([[1, 2], [3, 4]], r"\(2, 2\)"),
        ([[1], [2, 3]], "flat sequence"),
        (np.zeros((2, 4), np.uint32), r"\(2, 4\)"),
        (7, r"\(\)"),
    ],
    ids=str,
)
def test_what_is_no_sequence_of_token_ids_is_refused(tokens: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Chain(tokens, 2)


def test_the_extremes_are_tokens() -> None:
    assert Chain([0, 2**32 - 1], 2).digests() == digests_of([0, 2**32 - 1], 2)


def test_a_refused_extension_changes_nothing() -> None:
    chain = Chain([1, 2], 2)
    with pytest.raises(ConfigError):
        chain.extend([3, -1])
    chain.extend([3, 4])
    assert chain.digests() == digests_of([1, 2, 3, 4], 2)


@pytest.mark.parametrize("tokens", [[], [1], [1] * 7])
def test_less_than_a_chunk_has_no_digest(tokens: list[int]) -> None:
    chain = Chain(tokens, 8)
    assert len(chain) == 0 and chain.digests() == [] and chain.hashed == 0


@pytest.mark.parametrize("chunk_tokens", [0, -1])
def test_a_chunk_has_tokens(chunk_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"got {chunk_tokens}"):
        Chain([1], chunk_tokens)


# Digests that an engine computed


def test_a_chain_of_digests_hashes_nothing_and_is_equal() -> None:
    digests = digests_of(list(range(40)), 8)
    chain = Chain.from_digests(digests, 8, tenant="t")
    assert (len(chain), chain.hashed, chain.tenant, chain.positions_known) == (5, 5, "t", False)
    assert chain.digests() == digests and chain.digests(2) == digests[:2]
    assert Chain.from_digests(digests[2:], 8, positions_known=True).positions_known


@pytest.mark.parametrize("count", [0, 3])
def test_a_chain_of_digests_cannot_be_extended(count: int) -> None:
    chain = Chain.from_digests(digests_of(list(range(24)), 8)[:count], 8)
    with pytest.raises(ConfigError, match="cannot be extended"):
        chain.extend([1])


def test_a_digest_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 bytes, got 16"):
        Chain.from_digests([bytes(32), bytes(16)], 8)


# Texts


@given(st.binary(min_size=32, max_size=32))
def test_a_key_is_short_ascii_and_begins_with_its_origin(digest: bytes) -> None:
    origin = Origin("0" * 32, "1" * 16, "lossy.sixteen-chars-ab")
    key = key_text(origin, digest, "g" * 16, "L1000-1001.H1000-1001")
    assert key.startswith(origin.prefix())
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", key) and len(key) <= KEY_LIMIT
    assert key.split("/") == ["0" * 32, "1" * 16, origin.fidelity, digest.hex(), "g" * 16, "L1000-1001.H1000-1001"]


# The specification's own examples


@pytest.mark.parametrize("vector", vectors("chains"), ids=lambda vector: vector["name"])
def test_chain_vectors(vector: dict[str, Any]) -> None:
    overlays = vector.get("overlays", [])
    request = {"extra_key": vector.get("extra_key"), "cache_salt": vector.get("cache_salt")}
    chain = Chain(
        vector["tokens"], vector["chunk_tokens"], overlays=[Overlay(*overlay) for overlay in overlays], **request
    )
    assert [digest.hex() for digest in chain.digests()] == vector["digests"]
    assert request_seed(**request).hex() == vector.get("seed", "")
    ours = digests_of(vector["tokens"], vector["chunk_tokens"], overlays=[tuple(o) for o in overlays], **request)
    assert [digest.hex() for digest in ours] == vector["digests"]


def test_name_vectors() -> None:
    vector = vectors("names")
    text = vector["namespace_text"]
    facts = json.loads(text)
    assert text == json.dumps(facts, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest()[:32] == vector["namespace"]
    del facts["schema"]
    namespace = msgspec.convert(facts, Namespace)
    assert namespace.id == vector["namespace"]
    producer = Producer(*json.loads(vector["producer_text"]))
    assert hashlib.sha256(vector["producer_text"].encode()).hexdigest()[:16] == producer.id == vector["producer"]
    digest = Chain(*vector["chain"]).digests()[0]
    (cell, *_), (group, *_) = namespace.spec.cells, namespace.spec.groups
    assert key_text(Origin(namespace.id, producer.id), digest, group.name, cell.name) == vector["key"]
    assert [manifest_key(namespace.id), manifest_key(f"{namespace.id}/{producer.id}")] == vector["manifest_keys"]
