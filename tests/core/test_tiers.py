"""Tiers as people write them: what each option means, and that a wrong one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcache_backends.memory import MemoryBackend
from lmcache_sdk.backend import Item, Scan, open_backend
from lmcache_sdk.config import load_config
from lmcache_sdk.core.rules import Admit, TierRules, Write
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.tiers import open_tiers, parse_seconds, parse_tier
from lmcache_sdk.wrappers import Namespaced

URL = "redis://user:hunter2@cache:6379/0?token=hunter2"


def test_what_stands_before_the_mark_is_the_backends() -> None:
    tier = parse_tier(URL)
    assert (tier.url, tier.name, tier.rules) == (URL, "redis", TierRules())
    assert parse_tier(URL + "#").url == URL


@pytest.mark.parametrize(
    ("option", "rules"),
    [
        ("write=back", TierRules(write=Write.BACK)),
        ("write=evict", TierRules(write=Write.EVICT)),
        ("write=back&back=500ms", TierRules(write=Write.BACK, back_s=0.5)),
        ("admit=second", TierRules(admit=Admit.SECOND)),
        ("min_tokens=512", TierRules(min_tokens=512)),
        ("promote=no", TierRules(promote=False)),
        ("missing=10s&probe=200ms", TierRules(missing_s=10.0, probe_s=0.2)),
        ("missing=0", TierRules(missing_s=0.0)),
        ("failures=5&retry=1m", TierRules(failures=5, retry_s=60.0)),
    ],
)
def test_rules(option: str, rules: TierRules) -> None:
    assert parse_tier(f"{URL}#{option}").rules == rules


def test_what_is_no_rule_of_the_core() -> None:
    tier = parse_tier("lmdb:///a#name=near-by&size=2GiB&ttl=7d&codec=raw")
    assert (tier.name, tier.size, tier.ttl_s, tier.codec) == ("near-by", 2 << 30, 7 * 86400.0, "raw")
    packed = [parse_tier(f"s3://b{option}").pack_bytes for option in ("", "#pack=no", "#pack=8MiB")]
    assert packed == [None, 0, 8 << 20]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("wirte=back", "unknown option 'wirte'; did you mean 'write'?"),
        ("colour=red", "unknown option 'colour'; known are: name, write, back, admit"),
        ("write=later", "write: 'later' is none of through, back, evict"),
        ("admit=", "option 'admit' has no value"),
        ("admit=twice", "admit: 'twice' is none of always, second"),
        ("encrypt_key_file=", "option 'encrypt_key_file' has no value"),
        ("encrypt_key_env", "option 'encrypt_key_env' has no value"),
        ("prefix=", "option 'prefix' has no value"),
        ("promote=true", "promote: 'true' is neither yes nor no"),
        ("min_tokens=-1", "min_tokens: '-1' is not a whole number from 0"),
        ("failures=0", "failures: '0' is not a whole number from 1"),
        ("retry=0s", "retry: a duration must be positive here, got '0s'"),
        ("ttl=soon", "ttl: 'soon' is not a duration; write it like 30s"),
        ("size=much", "size: 'much' is not a size"),
        ("codec=morse", "codec: unknown codec 'morse'; installed are: raw"),
        ("name=pool", "name: 'pool' cannot be a tier's name"),
        ("name=a b", "name: 'a b' cannot be a tier's name"),
        ("write=back&write=evict", "option 'write' is given twice"),
        ("write", "option 'write' has no value"),
        ("pack=8MiB&encrypt_key_env=KEY", "cannot be packed into one; leave out pack, or the encryption"),
    ],
)
def test_a_wrong_option_is_named_and_no_secret(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tier(f"{URL}#{option}")
    text = str(caught.value)
    assert message in text and text.startswith("tier redis://user:***@cache:6379/0?token=***: ")
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("200ms", 0.2), ("10m", 600.0), ("2h", 7200.0), ("1d", 86400.0), ("1.5", 1.5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "1 week", "-1s", "1e3", "nan", "٣s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_seconds(text)


def test_tiers_are_opened_in_their_order(tmp_path: Path) -> None:
    tiers = open_tiers(["memory://#name=near&write=evict", f"file://{tmp_path}/s?size=64MiB#ttl=1h"])
    try:
        assert [(tier.name, tier.rules.write, tier.ttl_s) for tier in tiers] == [
            ("near", Write.EVICT, 0.0),
            ("file", Write.THROUGH, 3600.0),
        ]
    finally:
        for tier in tiers:
            tier.backend.close(1.0)


def test_two_tiers_of_one_name_are_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match="two tiers are called 'memory'; give one another name, by #name=TEXT"):
        open_tiers(["memory://", "memory://"])
    for tier in open_tiers(["memory://", "memory://#name=other"]):
        tier.backend.close(1.0)


@pytest.mark.parametrize("option", ["size=1GiB", "ttl=1h"])
@pytest.mark.parametrize("scheme", ["noop", "memory"])  # one lists nothing, the other without the time of writing
def test_bounds_need_a_store_that_can_list_its_records_with_their_age(scheme: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"tier {scheme}://: size and ttl need a store that can list its records"):
        open_tiers([f"{scheme}://#{option}"])


def test_if_one_does_not_open_those_before_it_are_closed(tmp_path: Path) -> None:
    first = f"lmdb://{tmp_path}/s?size=64MiB"
    with pytest.raises(ConfigError, match="unknown scheme 'nonesuch'"):
        open_tiers([first, "nonesuch://"])
    open_tiers([first])[0].backend.close(1.0)


def test_a_prefix_keeps_two_users_of_a_store_apart() -> None:
    tier = open_tiers(["memory://#prefix=a"])[0]
    tier.backend.put([Item("k", memoryview(b"x"))])
    assert isinstance(tier.backend, Namespaced) and isinstance(tier.backend, Scan)
    assert tier.backend.inner.contains(["k", "a/k"]) == [False, True]
    tier.backend.close(1.0)


class Packing(MemoryBackend):
    pack_bytes = 1 << 20

    def get_ranges(self, ranges: object) -> list[int]:
        raise NotImplementedError


@pytest.mark.parametrize(("option", "pack_bytes"), [("", 1 << 20), ("#pack=no", 0), ("#pack=2MiB", 2 << 20)])
def test_a_backend_may_say_how_much_to_pack(monkeypatch: pytest.MonkeyPatch, option: str, pack_bytes: int) -> None:
    monkeypatch.setattr("lmcache_sdk.tiers.open_backend", lambda url: Packing())
    assert open_tiers([f"memory://{option}"])[0].pack_bytes == pack_bytes


def test_what_cannot_read_parts_does_not_pack_by_itself() -> None:
    tier = open_tiers(["memory://"])[0]
    assert tier.pack_bytes == 0
    tier.backend.close(1.0)
    with pytest.raises(ConfigError, match="tier memory:// cannot pack: that needs a store that reads parts of records"):
        open_tiers(["memory://#pack=8MiB"])


def test_a_key_that_is_none_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tier lmdb://.*: .*nonesuch"):
        open_tiers([f"lmdb://{tmp_path}/s?size=64MiB#encrypt_key_file={tmp_path}/nonesuch"])
    assert not (tmp_path / "s").exists()


def test_a_backend_alone_does_not_take_options_and_ignore_them() -> None:
    with pytest.raises(ConfigError, match="behind # are options of a tier"):
        open_backend("memory://#encrypt_key_env=KEY")


# In the configuration


def test_tiers_in_yaml_are_texts_or_mappings(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("""
tiers:
  - lmdb:///var/lib/kv?size=50GiB#write=back
  - {url: "redis://cache:6379/0", write: evict, promote: no, failures: 5, name: far}
  - {url: "s3://bucket/a"}
eviction: s3fifo
""")
    config = load_config(file=file, environment={})
    assert config.tiers[0] == "lmdb:///var/lib/kv?size=50GiB#write=back"
    assert config.tiers[2] == "s3://bucket/a"
    tier = parse_tier(config.tiers[1])
    assert (tier.url, tier.name) == ("redis://cache:6379/0", "far")
    assert tier.rules == TierRules(write=Write.EVICT, promote=False, failures=5)
    assert config.eviction == "s3fifo"


def test_values_that_need_escaping_survive_a_mapping() -> None:
    config = load_config({"tiers": [{"url": "lmdb:///a", "name": "a&b=c d"}]}, environment={})
    with pytest.raises(ConfigError, match="name: 'a&b=c d' cannot be"):
        parse_tier(config.tiers[0])


def test_tiers_in_the_environment_are_separated_by_spaces() -> None:
    config = load_config(environment={"LMCACHE_SDK_TIERS": "lmdb:///a#write=back redis://b"})
    assert config.tiers == ("lmdb:///a#write=back", "redis://b")


@pytest.mark.parametrize("tier", [{"write": "back"}, {"url": 5}, {"url": "lmdb:///a#write=back", "back": "1s"}])
def test_a_mapping_without_a_plain_url_is_refused(tier: object) -> None:
    with pytest.raises(ConfigError, match="needs a url, with its options beside it"):
        load_config({"tiers": [tier]}, environment={})


def test_an_unknown_eviction_is_refused() -> None:
    with pytest.raises(ConfigError, match="eviction must be one of lru, s3fifo, got 'fifo'"):
        load_config({"eviction": "fifo"}, environment={})
