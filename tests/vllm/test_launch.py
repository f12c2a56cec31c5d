"""``lmcache-sdk launch-args vllm``: vLLM takes the flags, and finds the connector by them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs, FlexibleArgumentParser
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.worker.utils import select_common_block_size

from lmcache_adapters.vllm import LMCacheSDKConnector
from lmcache_adapters.vllm.settings import read_settings
from tests.core.served import command


def printed(model: Path, **variables: str) -> tuple[EngineArgs, str]:
    """As vLLM gets them from a shell, in the way of the docs, and what was said beside."""
    done = command("launch-args", "vllm", "--url", "unix:///run/kv.sock", **variables)
    assert done.returncode == 0, done.stderr
    line = ["sh", "-c", """eval printf "'%s\\0'" "$1" """, "sh", done.stdout]
    flags = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", str(model), *flags])), done.stderr


def test_vllm_takes_them(tiny_directory: Path) -> None:
    engine, said = printed(tiny_directory)
    transfer = engine.kv_transfer_config
    assert transfer is not None
    assert (transfer.kv_role, transfer.kv_load_failure_policy) == ("kv_both", "recompute")
    assert KVConnectorFactory.get_connector_class(transfer) is LMCacheSDKConnector
    assert read_settings(transfer.kv_connector_extra_config).url == "unix:///run/kv.sock"
    assert "has not been tried" not in said


@pytest.mark.parametrize(
    ("chunk_tokens", "block", "note"),
    [
        (64, 64, "a block of 64 tokens holds whole chunks, of 64"),
        (256, 256, "a block of 256 tokens"),
        (16, 64, "whole chunks, of 16"),
        (48, 192, "a block of 192 tokens holds whole chunks, of 48"),
        (1, 64, "whole chunks, of 1;"),
        (50, None, "whole chunks of 50 tokens: what it stores is of no use"),
    ],
)
def test_blocks_hold_whole_chunks(tiny_directory: Path, chunk_tokens: int, block: int | None, note: str) -> None:
    engine, said = printed(tiny_directory, LMCACHE_SDK_CHUNK_TOKENS=str(chunk_tokens))
    assert engine.block_size == block
    if block:
        select_common_block_size(block, [CPUAttentionBackend])
    assert note in said
