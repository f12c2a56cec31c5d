"""SGLang's page keys are our chunk digests: held against SGLang's own function."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str, storage_namespace_seed

from lmcache_adapters.sglang.identity import digests_of
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.keys import Chain, request_seed

TEXTS = [None, "", "a", "tenant-Ä-雪", "x" * 300]


@pytest.mark.timeout(180)  # SGLang compiles its hash on first use
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_keys_are_chunk_digests(page_size: int) -> None:
    random = np.random.default_rng(page_size)
    for pages, extra_key, cache_salt in [(1, None, None), (5, None, "s"), (3, "k", None), (4, "k", "s"), (2, "", "雪")]:
        tokens = random.integers(0, 2**31, pages * page_size)
        theirs = get_storage_hash_str(
            RadixKey(array("q", tokens.tolist()), extra_key=extra_key, cache_salt=cache_salt), None, page_size=page_size
        )
        ours = Chain(tokens, page_size, cache_salt=cache_salt, extra_key=extra_key).digests()
        assert digests_of(theirs) == ours


@pytest.mark.timeout(180)
def test_a_chain_goes_on_behind_a_key() -> None:
    tokens = np.arange(6 * 64)
    whole = [digest.hex() for digest in Chain(tokens, 64).digests()]
    rest = get_storage_hash_str(RadixKey(array("q", tokens[128:].tolist())), whole[1], page_size=64)
    assert rest == whole[2:]


@pytest.mark.parametrize("extra_key", TEXTS)
@pytest.mark.parametrize("cache_salt", TEXTS)
def test_seeds(extra_key: str | None, cache_salt: str | None) -> None:
    theirs = storage_namespace_seed(extra_key, cache_salt)
    assert request_seed(extra_key=extra_key, cache_salt=cache_salt).hex() == (theirs or "")


@pytest.mark.parametrize("key", ["", "ab", "g" * 64, "a" * 63, "a" * 66, None])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(ConfigError, match="SHA-256"):
        digests_of(["0" * 64, key])
