"""``lmcache-sdk launch-args``: SGLang takes the flags, and finds the backend by them."""

from __future__ import annotations

import shlex

import pytest
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
from sglang.srt.server_args import prepare_server_args

from lmcache_adapters.sglang import HiCacheBackend
from lmcache_adapters.sglang.settings import read_settings
from tests.core.served import command


def test_sglang_takes_them() -> None:
    done = command("launch-args", "sglang", "--url", "unix:///run/kv.sock", "--threshold", 128)
    assert done.returncode == 0, done.stderr
    flags = shlex.split(done.stdout)
    server = prepare_server_args(["--model-path", "dummy", "--device", "cpu", *flags])
    assert (server.page_size, server.hicache_storage_backend) == (64, "dynamic")
    assert (server.hicache_mem_layout, server.hicache_io_backend) == ("page_first_direct", "direct")
    parsed = HybridCacheController.parse_storage_backend_extra_config(server.hicache_storage_backend_extra_config)
    extra, threshold, *_, pass_prefix_keys = parsed
    assert (threshold, pass_prefix_keys) == (128, True)
    loaded = StorageBackendFactory._load_backend_class(extra["module_path"], extra["class_name"], "x")
    assert loaded is HiCacheBackend
    settings = read_settings(extra, 64)
    assert settings.url == "unix:///run/kv.sock" and settings.zero_copy
    assert "write_back" in done.stderr and "128 tokens" in done.stderr and "--hicache-ratio" in done.stderr
    assert "has not been tried" not in done.stderr


@pytest.mark.parametrize(
    ("engine", "message"),
    [("vllm", "vllm is not installed here"), ("tgi", "unknown engine 'tgi'; there are: sglang, vllm")],
)
def test_what_there_is_not(engine: str, message: str) -> None:
    done = command("launch-args", engine)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
