"""The backend on SGLang's own pools, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.served import Served
from tests.sglang.pools import LATENT_LAYOUTS, LAYOUTS, PAGE, Rank, digests

CASES = [*((layout, False) for layout in LAYOUTS), *((layout, True) for layout in LATENT_LAYOUTS)]


@pytest.mark.parametrize(("layout", "latent"), CASES)
def test_pages_come_back_from_every_layout_into_every_other(
    layout: str,
    latent: bool,
    tiny_directory: Path,
    latent_directory: Path,
    shared_daemon: Served,
    ranks: list[Rank],
) -> None:
    model = latent_directory if latent else tiny_directory
    writer = Rank(model, shared_daemon.url, layout=layout, latent=latent)
    ranks.append(writer)
    keys = digests(CASES.index((layout, latent)), 5)
    assert writer.backend.batch_exists(keys) == 0
    wanted = writer.fill([3, 9, 4, 20, 1], seed=7)
    assert writer.set(keys, [3, 9, 4, 20, 1]) == [True] * 5
    for other in LATENT_LAYOUTS if latent else LAYOUTS:
        reader = Rank(model, shared_daemon.url, layout=other, latent=latent)
        ranks.append(reader)
        around = reader.fill([0, 6, 7], seed=8)
        assert reader.backend.batch_exists(keys) == 5
        assert reader.get(keys, [5, 8, 2, 10, 23]) == [True] * 5
        assert torch.equal(reader.content([5, 8, 2, 10, 23]), wanted)
        assert torch.equal(reader.content([0, 6, 7]), around)


@pytest.mark.parametrize(("layout", "latent"), CASES)
def test_without_the_interface_of_places(
    layout: str,
    latent: bool,
    tiny_directory: Path,
    latent_directory: Path,
    shared_daemon: Served,
    ranks: list[Rank],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SGLang copies each page once more, and finds the same: what either interface has stored the other reads."""
    model = latent_directory if latent else tiny_directory
    generic = Rank(model, shared_daemon.url, layout=layout, latent=latent, extra={"interface_v1": 0})
    places = Rank(model, shared_daemon.url, layout="page_first", latent=latent)
    ranks.extend([generic, places])
    assert 'set "interface_v1": 1' in caplog.text
    keys = digests(300 + CASES.index((layout, latent)), 22)
    pages = list(range(1, 11))
    wanted = generic.fill(pages, seed=3)
    assert generic.get_generic(keys[:10], pages) == 0
    assert generic.set_generic(keys[:10], pages)
    assert generic.backend.batch_exists(keys) == 10
    around = generic.fill([0, 21, 22, 23], seed=4)
    assert generic.get_generic(keys[:12], list(range(11, 23))) == 10
    assert torch.equal(generic.content(list(range(11, 21))), wanted)
    assert torch.equal(generic.content([0, 21, 22, 23]), around)
    assert places.get(keys[:10], pages) == [True] * 10
    assert torch.equal(places.content(pages), wanted)
    more = places.fill([1, 2], seed=5)
    assert places.set(keys[10:12], [1, 2], before=keys[:10]) == [True] * 2
    assert generic.get_generic(keys[10:12], [5, 9]) == 2
    assert torch.equal(generic.content([5, 9]), more)
    assert generic.backend.get(keys[12], generic.host.get_dummy_flat_data_page()) is None
    assert generic.backend.set(keys[12], generic.host.get_data_page(5 * PAGE))
    assert not generic.backend.batch_set(keys[13:15], [None, None])
    assert places.backend.batch_get(keys[:1], [places.host.get_dummy_flat_data_page()]) == [None]
    assert not places.backend.batch_set(keys[:1], [places.host.get_data_page(0)])


def test_a_part_of_a_chain(tiny_directory: Path, shared_daemon: Served, ranks: list[Rank]) -> None:
    rank = Rank(tiny_directory, shared_daemon.url)
    ranks.append(rank)
    keys = digests(100, 8)
    wanted = rank.fill([1, 2, 3, 4], seed=1)
    assert rank.set(keys[2:6], [1, 2, 3, 4], before=keys[:2]) == [True] * 4
    assert rank.backend.batch_exists(keys) == 0
    assert rank.backend.batch_exists(keys[2:]) == 4
    assert rank.backend.exists(keys[5]) and not rank.backend.exists(keys[6])
    before = rank.fill([14, 15], seed=2)
    assert rank.get(keys[2:], [10, 11, 12, 13, 14, 15]) == [True] * 4 + [False] * 2
    assert torch.equal(rank.content([10, 11, 12, 13]), wanted)
    assert torch.equal(rank.content([14, 15]), before)
    assert rank.set(keys[2:6], [5, 6, 7, 8]) == [True] * 4  # it has them
    assert rank.get(keys[4:6], [9, 10]) == [True] * 2
    assert torch.equal(rank.content([9, 10]), wanted[:, 2 * PAGE :])


def test_a_chain_of_many_batches(tiny_directory: Path, shared_daemon: Served, ranks: list[Rank]) -> None:
    """SGLang asks for a whole chain at once, and reads it in batches."""
    rank = Rank(tiny_directory, shared_daemon.url, page=16, pages=300)
    ranks.append(rank)
    keys = digests(101, 75)[:75]
    pages = list(range(75))
    wanted = rank.fill(pages, seed=3)
    assert rank.set(keys[:50], pages[:50], before=[]) == [True] * 50
    assert rank.set(keys[50:], pages[50:], before=keys[:50]) == [True] * 25
    assert rank.backend.batch_exists(keys) == 75
    assert len(rank.backend._held) == 1
    for first in (0, 30, 60):
        assert all(rank.get(keys[first : first + 30], list(range(100 + first, 100 + min(first + 30, 75)))))
    assert not rank.backend._held
    assert torch.equal(rank.content(list(range(100, 175))), wanted)


def test_tensor_parallel_ranks_store_their_own_heads(
    tiny_directory: Path, shared_daemon: Served, ranks: list[Rank], caplog: pytest.LogCaptureFixture
) -> None:
    pair = [Rank(tiny_directory, shared_daemon.url, tp_size=2, tp_rank=rank) for rank in range(2)]
    ranks.extend(pair)
    assert "engines of another size do not share" in caplog.text
    keys = digests(102, 3)
    wanted = [rank.fill([1, 2, 3], seed=rank.backend._config.tp_rank) for rank in pair]
    assert pair[0].set(keys, [1, 2, 3]) == [True] * 3
    assert [rank.backend.batch_exists(keys) for rank in pair] == [0, 0]  # half of it is missing
    assert pair[1].set(keys, [1, 2, 3]) == [True] * 3
    for rank, content in zip(pair, wanted, strict=True):
        assert rank.get(keys, [7, 8, 9]) == [True] * 3
        assert torch.equal(rank.content([7, 8, 9]), content)


def test_latent_pages_are_stored_once_and_read_by_all_ranks(
    latent_directory: Path, served: Served, ranks: list[Rank]
) -> None:
    pair = [Rank(latent_directory, served.url, latent=True, tp_size=2, tp_rank=rank) for rank in range(2)]
    ranks.extend(pair)
    assert [rank.config.is_storage_writer for rank in pair] == [True, False]  # SGLang stores by the first alone
    keys = digests(107, 3)
    wanted = pair[0].fill([1, 2, 3], seed=1)
    assert pair[0].set(keys, [1, 2, 3]) == [True] * 3
    for rank in pair:
        assert rank.backend.batch_exists(keys) == 3
        assert rank.get(keys, [7, 8, 9]) == [True] * 3
        assert torch.equal(rank.content([7, 8, 9]), wanted)
    pair[1].fill([1, 2, 3], seed=2)
    assert pair[1].set(keys, [1, 2, 3]) == [True] * 3  # it has them, and keeps what it has
    assert served.status()["stats"]["chunks"] == 3
    assert pair[0].get(keys, [10, 11, 12]) == [True] * 3
    assert torch.equal(pair[0].content([10, 11, 12]), wanted)


def test_a_finer_grid_is_shared_by_engines_of_any_size(
    tiny_directory: Path, shared_daemon: Served, ranks: list[Rank]
) -> None:
    fine = {"heads_per_cell": 1}
    whole = Rank(tiny_directory, shared_daemon.url, extra=fine)
    pair = [Rank(tiny_directory, shared_daemon.url, tp_size=2, tp_rank=rank, extra=fine) for rank in range(2)]
    ranks.extend([whole, *pair])
    keys = digests(103, 2)
    wanted = whole.fill([1, 2], seed=5)
    assert whole.set(keys, [1, 2]) == [True] * 2
    for number, rank in enumerate(pair):
        assert rank.get(keys, [4, 5]) == [True] * 2
        assert torch.equal(rank.content([4, 5]), wanted[:, :, 2 * number : 2 * number + 2])
    keys = digests(104, 2)
    halves = [rank.fill([1, 2], seed=number) for number, rank in enumerate(pair)]
    for rank in pair:
        assert rank.set(keys, [1, 2]) == [True] * 2
    assert whole.get(keys, [8, 9]) == [True] * 2
    assert torch.equal(whole.content([8, 9]), torch.cat(halves, dim=2))


def test_whose_kv_is_used(tiny_directory: Path, shared_daemon: Served, ranks: list[Rank], stranger: Rank) -> None:
    keys = digests(110, 3)
    wanted = stranger.fill([1, 2, 3], seed=1)
    assert stranger.set(keys, [1, 2, 3], before=[]) == [True] * 3
    for share, found in (("own", 0), ("verified", 0), ("any", 3)):
        ranks.append(reader := Rank(tiny_directory, shared_daemon.url, extra={"share": share}))
        assert reader.backend.batch_exists(keys) == found
        assert reader.get(keys, [7, 8, 9]) == [found == 3] * 3
        assert torch.equal(reader.content([7, 8, 9]), wanted) == (found == 3)


def test_clear(tiny_directory: Path, served: Served, ranks: list[Rank]) -> None:
    rank = Rank(tiny_directory, served.url)
    ranks.append(rank)
    keys = digests(105, 2)
    rank.fill([1, 2], seed=5)
    rank.set(keys, [1, 2])
    assert rank.backend.batch_exists(keys) == 2
    rank.get(keys, [3, 4])
    rank.backend.clear()
    assert rank.backend.batch_exists(keys) == 0
    assert rank.backend.get_stats() is None


def test_attached_to_memory_in_use(tiny_directory: Path, shared_daemon: Served, ranks: list[Rank]) -> None:
    """The proof writes into pages that may hold something: they are as before."""
    held: dict[str, Any] = {}

    def fill(rank: Rank) -> None:
        held["content"] = rank.fill(list(range(24)), seed=1)

    for layout in LAYOUTS:
        rank = Rank(tiny_directory, shared_daemon.url, layout=layout, before=fill)
        ranks.append(rank)
        assert torch.equal(rank.content(list(range(24))), held["content"])


def test_detached_it_misses_and_attached_again_it_hits(
    tiny_directory: Path, shared_daemon: Served, ranks: list[Rank]
) -> None:
    keys = digests(106, 1)
    first = Rank(tiny_directory, shared_daemon.url)
    wanted = first.fill([1], seed=1)
    first.set(keys, [1])
    first.close()
    assert first.backend.batch_exists(keys) == 0
    assert first.get(keys, [2]) == first.set(keys, [2]) == [False]
    second = Rank(tiny_directory, shared_daemon.url)
    ranks.append(second)
    assert second.get(keys, [2]) == [True]
    assert torch.equal(second.content([2]), wanted)
