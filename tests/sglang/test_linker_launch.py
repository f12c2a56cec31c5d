"""``lmcache-sdk launch-args sglang --linker``: SGLang takes the flags, and finds the linker by them."""

from __future__ import annotations

import importlib
import shlex

from sglang.srt.mem_cache.unified_cache.linker_config import UnifiedCacheLinkerConfig
from sglang.srt.server_args import prepare_server_args

from lmcache_adapters.sglang import Linker
from lmcache_adapters.sglang.settings import read_linker_settings
from tests.core.served import command


def test_sglang_takes_them() -> None:
    done = command("launch-args", "sglang", "--url", "unix:///run/kv.sock", "--linker")
    assert done.returncode == 0, done.stderr
    server = prepare_server_args(["--model-path", "dummy", "--device", "cpu", *shlex.split(done.stdout)])
    assert (server.page_size, server.enable_unified_cache_external_linker) == (64, True)
    assert server.unified_cache_external_linker_backend == "dynamic"
    config = UnifiedCacheLinkerConfig.from_dict(server.unified_cache_external_linker_config)
    assert getattr(importlib.import_module(config.linker_module_path), config.linker) is Linker
    settings = read_linker_settings(config.linker_extra_config, 64)
    assert settings.url == "unix:///run/kv.sock" and settings.lookup_timeout_s == 0.05
    assert "experimental" in done.stderr and "has not been tried" not in done.stderr
