"""Replicas on two nodes: each engine has a daemon of its own, and one Redis server is behind both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import environments
import numpy as np
import pytest

from tests.backends.programs import lacking
from tests.vllm.process import engine


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The URLs of their daemons, which are of the environment `backends`."""
    if not (environments.folder_of("backends") / environments.STAMP).exists():
        lacking('the environment `backends` is not built: make nox ARGS="-s backends"')
    line = [sys.executable, "tools/environments.py", "run", "backends", "--", "python", "tests/vllm/fleet.py"]
    with subprocess.Popen(
        line, cwd=environments.ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as fleet:
        assert fleet.stdin and fleet.stdout
        try:
            urls = fleet.stdout.readline()
            assert urls, "the servers did not start; why is on stderr"
            if not json.loads(urls):
                lacking("no redis-server in the environment `backends`")
            yield json.loads(urls)
        finally:
            fleet.stdin.close()
            fleet.wait(30)


@pytest.mark.timeout(180)
def test_what_one_node_computes_the_other_finds(tiny_directory: Path, nodes: list[str]) -> None:
    ids, other = (np.random.default_rng([19, seed]).integers(10, 1000, 300).tolist() for seed in range(2))
    here, there = (engine(tiny_directory, url) for url in nodes)
    with here, there:
        for first, second, prompt in ((here, there, ids), (there, here, other)):
            cold = first.generate(prompt, 8, logits=True)
            assert cold["cached_tokens"] == 0
            assert first.flush()
            warm = second.generate(prompt, 8, logits=True)
            assert warm["cached_tokens"] == 256
            assert (warm["token_ids"], warm["top"]) == (cold["token_ids"], cold["top"])
        assert here.stop() == there.stop() == 0
