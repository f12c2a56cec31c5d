"""KV of the right names and sizes that means something else: garbage where it is used, not used where it is compared.

Transformers reads what a script has written into a store, under the names of engines that do not exist.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lmcache_adapters.hf import Model, Result, Runner
from lmcache_sdk.keys import Chain
from lmcache_sdk.open import LocalCache
from lmcache_sdk.spec import Producer
from lmcache_sdk.store import Store
from lmcache_sdk.tiers import open_tiers
from tests.cross import kv
from tests.cross.conftest import Text
from tests.cross.gates import MOST_K_ERROR, MOST_KL, MOST_V_ERROR
from tests.cross.kv import KV
from tests.cross.starts import CHUNK
from tests.daemon.daemon_process import until

pytestmark = pytest.mark.timeout(120)

SEED = 20
COMMON = 6 * CHUNK
STORED = 10 * CHUNK
QUESTION = 80
RIGHT = "right"
WRONG = ("keys negated", "keys by head first", "interleaved rotation", "shifted by a token", "other weights")
SUBTLE = "shifted by a token"  # what a reply may hardly show, and the numbers do


class Known(NamedTuple):
    """What Transformers computes, and what others make of it.

    Attributes:
        common: tokens of a text that it will compute itself.
        prompt: those of one that others have stored, and a question.
        own: its reply to the prompt.
        kv: by name, the KV of the common text, and that of the stored part of the prompt.
    """

    common: list[int]
    prompt: list[int]
    own: Result
    kv: dict[str, tuple[KV, ...]]


@pytest.fixture(scope="module")
def known(model: Model, text: Text, tmp_path_factory: pytest.TempPathFactory) -> Known:
    common, prompt = text("try", "with", tokens=COMMON), text("types", tokens=STORED + QUESTION)
    texts = common, prompt[:STORED]
    own, reply = _compute(model, tmp_path_factory.mktemp("own"), texts, prompt)
    other, _ = _compute(_with_other_weights(model), tmp_path_factory.mktemp("other"), texts, prompt)
    assert reply is not None
    found: dict[str, tuple[KV, ...]] = {
        RIGHT: tuple(kv.noisy(some, 0.01, SEED) for some in own),
        "other weights": other,
    }
    for some in own:
        for name, wrong in kv.wrong_conventions(some).items():
            found[name] = (*found.get(name, ()), wrong)
    return Known(common, prompt, reply, found)


def _compute(
    model: Model, folder: Path, texts: tuple[list[int], ...], prompt: list[int]
) -> tuple[tuple[KV, ...], Result]:
    with Runner(model, _url(folder), share="own") as runner:
        for ids in texts:
            runner.generate(ids, max_new_tokens=1)
        assert runner.drain()
        assert runner.cache is not None
        found = tuple(kv.read(runner.cache, Chain(ids, CHUNK)) for ids in texts)
        return found, runner.generate(prompt, max_new_tokens=1, load=False, store=False, keep_logits=True)


def _with_other_weights(model: Model) -> Model:
    """A little off, as after some more training."""
    network = copy.deepcopy(model.network)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * weight.float().std() * torch.randn(weight.shape)
    return dataclasses.replace(model, network=network)


def _url(folder: Path) -> str:
    return f"lmdb://{folder}/store?size=512MiB"


def _producer(name: str) -> Producer:
    return Producer("script", name.replace(" ", "-"), "cpu")


def _write(url: str, model: Model, known: Known, *names: str) -> None:
    """The script: each name becomes a producer that has stored both texts."""
    store = Store(open_tiers([url]), pool_bytes=256 << 20)
    for name in names:
        cache = LocalCache(store, model.namespace, _producer(name))
        for ids, some in zip((known.common, known.prompt[:STORED]), known.kv[name], strict=True):
            kv.write(cache, Chain(ids, CHUNK), some)
    assert store.drain(20)
    store.close()


def _divergence(own: Result, other: Result) -> float:
    mine, theirs = (torch.from_numpy(reply.logits).double().log_softmax(-1) for reply in (own, other))
    return float((mine.exp() * (mine - theirs)).sum())


def _ask(runner: Runner, known: Known) -> Result:
    return runner.generate(known.prompt, max_new_tokens=1, store=False, keep_logits=True)


@pytest.mark.parametrize("name", WRONG)
def test_used_unseen_it_fails_a_gate(model: Model, known: Known, name: str, tmp_path: Path) -> None:
    _write(_url(tmp_path), model, known, name)
    with Runner(model, _url(tmp_path), share="any") as runner:
        reply = _ask(runner, known)
        assert reply.cached_tokens == STORED
        found = _divergence(known.own, reply)
    k_error, v_error = kv.errors(known.kv[name][1], known.kv[RIGHT][1])
    print(f"{name}: KL {found:.4f} K {k_error:.3f} V {v_error:.3f}")
    assert k_error > MOST_K_ERROR or v_error > MOST_V_ERROR
    if name != SUBTLE:
        assert found > MOST_KL


def test_right_chunks_of_another_do_not(model: Model, known: Known, tmp_path: Path) -> None:
    _write(_url(tmp_path), model, known, RIGHT)
    with Runner(model, _url(tmp_path), share="any") as runner:
        reply = _ask(runner, known)
        assert reply.cached_tokens == STORED
        print(f"KL {_divergence(known.own, reply):.5f}")
        assert _divergence(known.own, reply) < MOST_KL


def test_an_engine_by_itself_uses_nothing(model: Model, known: Known, tmp_path: Path) -> None:
    _write(_url(tmp_path), model, known, RIGHT)
    with Runner(model, _url(tmp_path), share="own") as runner:
        runner.generate(known.common, max_new_tokens=1)
        assert runner.drain()
        assert _ask(runner, known).cached_tokens == 0


def test_compared_only_what_agrees_is_used(model: Model, known: Known, tmp_path: Path) -> None:
    """And no deeper than it was compared."""
    _write(_url(tmp_path), model, known, RIGHT, *WRONG)
    with Runner(model, _url(tmp_path), share="verified") as runner:
        assert _ask(runner, known).cached_tokens == 0
        runner.generate(known.common, max_new_tokens=1)
        assert runner.drain()
        states = _settled(runner, 1 + len(WRONG))
        assert states == {RIGHT: "open", **dict.fromkeys(WRONG, "closed")}
        reply = _ask(runner, known)
        assert reply.cached_tokens == COMMON
        assert _divergence(known.own, reply) < MOST_KL


def test_compared_what_is_wrong_is_not_used(model: Model, known: Known, tmp_path: Path) -> None:
    _write(_url(tmp_path), model, known, *WRONG)
    with Runner(model, _url(tmp_path), share="verified") as runner:
        runner.generate(known.common, max_new_tokens=1)
        assert runner.drain()
        assert set(_settled(runner, len(WRONG)).values()) == {"closed"}
        assert _ask(runner, known).cached_tokens == 0
    with Runner(model, _url(tmp_path), share="verified") as runner:  # which is remembered
        assert _ask(runner, known).cached_tokens == 0
        assert set(_settled(runner, len(WRONG)).values()) == {"closed"}


def _settled(runner: Runner, pairs: int) -> dict[str, str]:
    """What became of each name, once all have been compared."""
    names = {_producer(name).name: name for name in (RIGHT, *WRONG)}
    states: dict[str, str] = {}

    def settled() -> bool:
        assert runner.cache is not None
        states.clear()
        for pair in runner.cache.stats().pairs:
            for producer in pair.producers:
                if producer in names and any("script" not in one for one in pair.producers):
                    whole = pair.state != "open" or pair.depth == COMMON
                    states[names[producer]] = pair.state if whole else "checking"
        return len(states) == pairs and "checking" not in states.values()

    until(settled, 20, "that all have been compared")
    return states
