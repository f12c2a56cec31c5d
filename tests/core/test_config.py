"""One configuration from flags, environment and a file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_sdk.config import Config, Tenant, cache_home, format_size, hide_secrets, load_config, parse_size
from lmcache_sdk.errors import ConfigError

GiB = 1 << 30


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# Precedence

SOURCES = {"flags": 3, "environment": 2, "file": 1}


@pytest.mark.parametrize(
    "present", [set(some) for count in range(4) for some in itertools.combinations(SOURCES, count)], ids=str
)
def test_flags_win_over_environment_over_file(tmp_path: Path, present: set[str]) -> None:
    file = write(tmp_path / "c.yaml", "chunk_tokens: 1\n") if "file" in present else None
    environment = {"LMCACHE_SDK_CHUNK_TOKENS": "2"} if "environment" in present else {}
    flags = {"chunk_tokens": 3} if "flags" in present else {}
    config = load_config(flags, file=file, environment=environment)
    assert config.chunk_tokens == max((SOURCES[name] for name in present), default=64)


def test_each_setting_comes_from_where_it_is_set(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "url: memory://\npool_bytes: 2GiB\nwait_s: 1\n")
    environment = {"LMCACHE_SDK_POOL_BYTES": "3GiB", "LMCACHE_SDK_WAIT_S": "2.5"}
    found = load_config({"wait_s": 7, "chunk_tokens": None}, file=file, environment=environment)
    assert found == Config(url="memory://", pool_bytes=3 * GiB, wait_s=7.0)


def test_every_setting_can_come_from_everywhere(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "url": "lmdb:///x", "pool_bytes": 1 << 20, "chunk_tokens": 16, "layers_per_cell": 2, "heads_per_cell": 1,
        "wait_s": 0.5, "log_level": "DEBUG", "log_format": "json", "socket": "/run/kv.sock", "group": "users",
        "tiers": ("lmdb:///a?size=1GiB", "memory://"), "require_salt": True, "keep_pool": False, "metrics_port": 9100,
        "metrics_host": "::1", "metrics_token_file": "/t", "metrics_cert": "/c", "metrics_key": "/k",
        "eviction": "s3fifo", "tenants": {"a": Tenant(quota=1 << 20, weight=2)}, "kernels": {"cuda": "mine"},
        "pinning": "staged", "share": "own",
    }  # fmt: skip
    assert set(values) == set(Config.__struct_fields__)
    expected = Config(**values)
    assert load_config(values, environment={}) == expected
    texts = values | {
        "tiers": "lmdb:///a?size=1GiB memory://",
        "tenants": "{a: {quota: 1MiB, weight: 2}}",
        "kernels": "{cuda: mine}",
    }
    assert load_config(environment={f"LMCACHE_SDK_{k.upper()}": str(v) for k, v in texts.items()}) == expected
    assert load_config(values | {"tiers": list(values["tiers"])}, environment={}) == expected
    file = write(tmp_path / "c.yaml", "".join(f"{k}: {v}\n" for k, v in texts.items()))
    assert load_config(file=file, environment={}) == expected


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    named = {"LMCACHE_SDK_CONFIG": str(write(tmp_path / "a.yaml", "chunk_tokens: 5"))}
    assert load_config(environment=named).chunk_tokens == 5
    given_file = write(tmp_path / "b.yaml", "chunk_tokens: 6")
    assert load_config(file=given_file, environment=named).chunk_tokens == 6


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_SDK_CHUNK_TOKENS", "9")
    assert load_config().chunk_tokens == 9


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(environment={}) == Config()


# Sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1), (17, 17), ("17B", 17), ("1K", 1024), ("1k", 1024), ("1KiB", 1024), ("1kb", 1000), ("1.5KiB", 1536),
        ("512MiB", 512 << 20), ("30GB", 30 * 10**9), ("20GiB", 20 * GiB), (" 20 GiB ", 20 * GiB), ("2TiB", 2 << 40),
        ("0.5GiB", GiB // 2),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes
    assert load_config({"pool_bytes": text}, environment={}).pool_bytes == nbytes
    assert load_config(environment={"LMCACHE_SDK_POOL_BYTES": str(text)}).pool_bytes == nbytes


@pytest.mark.parametrize(
    "text", ["", "lots", "GiB", "1 2", "-1GiB", "1XiB", "1e3", "0x10", "1,5GiB", "nan", None, True, [1]]
)
def test_what_is_no_size_is_refused_with_examples(text: Any) -> None:
    with pytest.raises(ConfigError, match="is not a size; write it like 20GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", 0, "0GiB", "0.1B"])
def test_a_size_is_positive(text: str | int) -> None:
    with pytest.raises(ConfigError, match=f"must be positive, got {text!r}"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_a_plain_number_is_itself(nbytes: int) -> None:
    assert parse_size(str(nbytes)) == parse_size(nbytes) == nbytes


@given(st.integers(1, 1 << 50))
def test_a_printed_size_reads_back_nearly(nbytes: int) -> None:
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= max(1, 0.06 * nbytes)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (GiB, "1.0 GiB"), (1 << 50, "1024.0 TiB")]
)
def test_printed_sizes(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


# Mistakes


def test_a_misspelt_flag_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'pool_byte' in flags; did you mean 'pool_bytes'\?"):
        load_config({"pool_byte": 1}, environment={})


def test_a_misspelt_line_of_the_file_is_refused_with_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "chunk_token: 64\n")
    with pytest.raises(ConfigError, match=r"'chunk_token' in .*c\.yaml; did you mean 'chunk_tokens'\?"):
        load_config(file=file, environment={})


@pytest.mark.parametrize("variable", ["LMCACHE_SDK_POOL_BYTE", "LMCACHE_SDK_CHUNKTOKENS", "LMCACHE_SDK_URLS"])
def test_a_misspelt_variable_is_refused_with_the_nearest(variable: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"unknown setting '{variable}' in the environment; did you mean 'LMCACHE_SDK_"
    ):
        load_config(environment={variable: "1"})


def test_variables_of_others_are_left_alone() -> None:
    others = dict.fromkeys(
        ["LMCACHE_SDK_VENVS", "LMCACHE_SDK_TEST_MODEL", "LMCACHE_SDK_SEED", "POOL_BYTE", "LMCACHE_CHUNK_SIZE"], "x"
    )
    assert load_config(environment=others) == Config()


def test_something_quite_unknown_is_refused_with_all_that_is_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting 'zzz' in flags; known are: url, pool_bytes, chunk_tokens"):
        load_config({"zzz": 1}, environment={})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"chunk_tokens": "many"}, r"bad setting: Expected `int`.*chunk_tokens"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"chunk_tokens": 1.5}, "chunk_tokens"),
        ({"layers_per_cell": -1}, "layers_per_cell must not be negative, got -1"),
        ({"heads_per_cell": "-3"}, "heads_per_cell must not be negative, got -3"),
        ({"wait_s": -0.1}, "wait_s must not be negative, got -0.1"),
        ({"wait_s": "nan"}, "wait_s must not be negative, got nan"),
        ({"wait_s": "soon"}, "wait_s"),
        ({"pool_bytes": "1 lot"}, "'1 lot' is not a size"),
        ({"log_level": "LOUD"}, "log_level must be one of .*INFO.*, got 'LOUD'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(flags, environment={})


def test_a_level_in_small_letters_will_do() -> None:
    assert load_config({"log_level": "debug"}, environment={}).log_level == "debug"


# Secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:secret@host/1?a=b", "redis://me:***@host/1?a=b"),
        ("redis://:sec/r@et@host", "redis://:***@host"),
        ("redis://:se?c#ret@host/0", "redis://:***@host/0"),
        ("redis://:sec", "redis://:***"),
        ("redis://host:63x9/0", "redis://host:***"),
        ("redis://host:6379/0?ttl=1d", "redis://host:6379/0?ttl=1d"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("s3://b/p?access_key_id=1&secret_key=2&region=x", "s3://b/p?access_key_id=***&secret_key=***&region=x"),
        ("redis://me@host", "redis://me@host"),
        ("lmdb:///a@b?size=1GiB", "lmdb:///a@b?size=1GiB"),
    ],
)
def test_urls_are_shown_without_secrets(url: str, shown: str) -> None:
    assert hide_secrets(url) == shown


@pytest.mark.parametrize(
    "text",
    [
        "tiers: [redis/me:secret@host]",  # no URL, and so what is a password in it cannot be told
        "tiers: {redis: 'redis://me:secret@host'}",
        "tiers: [[secret]]",
        "url: [redis://me:secret@host]",
        "tiers: [redis://me:secret@host",  # no YAML
        'tiers: "redis://me:secret@host\ntiers: {',
        "tiers: !secret x",
    ],
)
def test_what_is_wrong_is_said_without_secrets(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file=write(tmp_path / "c.yaml", text), environment={})
    assert "c.yaml" in str(caught.value)
    assert "secret@" not in str(caught.value) and "[secret" not in str(caught.value)


def test_a_tier_that_is_no_url_is_told_by_its_number() -> None:
    with pytest.raises(ConfigError, match=r"tiers must be URLs like lmdb:.*, and number 2 has no :// \(in flags?\)"):
        load_config({"tiers": ["memory://", "redis/me:secret@host"]}, environment={})


def test_a_line_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml is not YAML: .* in line 3, column 1"):
        load_config(file=write(tmp_path / "c.yaml", "chunk_tokens: 1\ntiers: [a\n"), environment={})


# The file


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n"])
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    assert load_config(file=write(tmp_path / "c.yaml", text), environment={}) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- chunk_tokens", r"c\.yaml must be a mapping of settings, it is a list"),
        ("64", "it is a int"),
        ("chunk_tokens: [", r"c\.yaml is not YAML"),
        ("a: b: c", r"c\.yaml is not YAML"),
        ("\tchunk_tokens: 1", r"c\.yaml is not YAML"),
        ("chunk_tokens:", "chunk_tokens"),
        ("1: 2", "unknown setting '1'"),
        ("url: !!python/object/apply:os.getcwd []", r"c\.yaml is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file=write(tmp_path / "c.yaml", text), environment={})


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"c\.yaml is not YAML"):
        load_config(file=tmp_path / "c.yaml", environment={})


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere\.yaml: No such file"):
        load_config(file=tmp_path / "nowhere.yaml", environment={})
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(environment={"LMCACHE_SDK_CONFIG": str(tmp_path)})


def test_the_default_place_of_a_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "lmcache-sdk"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "lmcache-sdk"
