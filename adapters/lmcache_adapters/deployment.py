"""What engine adapters have in common: where a model's weights are, and what a tensor-parallel rank holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lmcache_sdk.errors import ConfigError, UnsupportedError
from lmcache_sdk.spec import WHOLE, CellGrid, Group, GroupKind, Namespace, Part


def part_of(group: Group, ranks: int, rank: int) -> Part:
    """What a tensor-parallel rank holds; where there are more ranks than heads, several hold the same."""
    if ranks == 1 or group.kind == GroupKind.LATENT:
        return WHOLE
    if ranks > group.heads:
        head = rank * group.heads // ranks
        return Part(heads=(head, head + 1))
    count = group.heads // ranks
    return Part(heads=(rank * count, (rank + 1) * count))


def with_grid_of(namespace: Namespace, ranks: int, log: logging.Logger) -> Namespace:
    """Where nobody has chosen a grid, a cell is one rank's shard; said once, since others then do not share."""
    spec = namespace.spec
    group = spec.groups[0]
    if ranks == 1 or spec.grid.heads_per_cell or group.kind == GroupKind.LATENT:
        return namespace
    heads = max(1, group.heads // ranks)
    log.warning(
        "cells of %d KV heads, the shard of tensor parallelism %d: engines of another size do not share this cache; "
        "set heads_per_cell (1 shares with all) for the whole fleet if they should",
        heads,
        ranks,
    )
    grid = CellGrid(spec.grid.layers_per_cell, heads)
    return msgspec.structs.replace(namespace, spec=msgspec.structs.replace(spec, grid=grid))


def refuse_load_format(load_format: str, served: Sequence[str]) -> None:
    """Raise UnsupportedError unless it reads the files of the model's directory that its fingerprint reads.

    Args:
        served: those of the engine that do.
    """
    if load_format == "dummy":
        raise UnsupportedError("load_format=dummy: random weights have no identity that KV could be kept under")
    if load_format not in served:
        raise UnsupportedError(
            f"load_format={load_format}: its weights need not be those of the model's directory, which KV is kept "
            f"under; served are {', '.join(served)}"
        )


def weights_directory(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Where the weights are; those of a hub id have been downloaded by now.

    Raises:
        UnsupportedError: a single file.
        ConfigError: they are not on this machine.
    """
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UnsupportedError(f"{path} is a single file; the cache needs a model directory with config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the weights of {model!r} are not on this machine: {error}") from error
