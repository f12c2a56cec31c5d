"""``ls``, ``du``, ``clear`` and ``gc``: looking into a store and cleaning it. None of them creates one."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from lmcache_sdk.backend import Stat, Usage
from lmcache_sdk.cli.inventory import Space, Standing, Survey, damaged, misfits, survey
from lmcache_sdk.cli.output import counted, print_json, print_table
from lmcache_sdk.cli.target import Listed, existing_store, is_shared, target
from lmcache_sdk.config import format_size, hide_secrets
from lmcache_sdk.errors import ConfigError

UrlArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[URL]",
        help="The store, like lmdb:///var/lib/kv. By default the configured one, else that of this user.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_SHORT_ID = 12
_DELETE_BATCH = 256


def ls(url: UrlArgument = None, json: JsonOption = False) -> None:
    """List the namespaces in a store: a model's weights, KV dtype and chunk size each.

    A namespace is stale if nobody can hit it again: its model directory is gone or holds other weights, or
    another version of this program wrote it.
    """
    with existing_store(target(url)) as backend:
        found = survey(backend)
    rows = [_listed(space, is_shared(target(url))) for space in found.spaces.values()]
    rows.sort(key=lambda row: -row["bytes"])
    if json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"no namespaces in {hide_secrets(target(url))}")
    for at, row in enumerate(rows):
        if at:
            typer.echo()
        dtype, chunk = row["dtype"] or "?", row["chunk_tokens"] or "?"
        typer.echo(f"{row['namespace']}  {row['label'] or 'no name'}, {dtype}, chunks of {chunk} tokens")
        typer.echo(f"  status     {row['status']}{': ' if row['why'] else ''}{row['why']}")
        typer.echo(f"  source     {row['source'] or 'not recorded'}")
        names = ", ".join(producer["name"] or producer["id"] for producer in row["producers"])
        typer.echo(f"  producers  {names or 'none'}")
        typer.echo(
            f"  holds      {counted(row['chunks'], 'chunk')}, {counted(row['records'], 'record')}, "
            f"{format_size(row['bytes'])}"
        )


def _listed(space: Space, shared: bool) -> dict[str, Any]:
    standing, why = space.standing(shared=shared)
    manifest = space.manifest
    return {
        "namespace": space.id,
        "label": space.label,
        "source": manifest.source if manifest else "",
        "dtype": "+".join(dict.fromkeys(g.dtype for g in manifest.spec.groups)) if manifest else "",
        "chunk_tokens": manifest.spec.chunk_tokens if manifest else 0,
        "producers": [
            {"id": identifier, "name": producer.name if producer else ""}
            for identifier, producer in space.producers.items()
        ],
        "chunks": space.chunks,
        "records": len(space.records),
        "bytes": space.nbytes,
        "status": standing.value,
        "why": why,
    }


def du(url: UrlArgument = None, json: JsonOption = False) -> None:
    """Show what takes the space in a store: bytes by namespace, producer and fidelity."""
    with existing_store(target(url)) as backend:
        found = survey(backend)
        usage = backend.usage() if isinstance(backend, Usage) else None
    rows = sorted(_shares(found), key=lambda row: -row["bytes"])
    total = {
        "records": sum(row["records"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "used_bytes": usage.used_bytes if usage else None,
        "capacity_bytes": (usage.capacity_bytes or None) if usage else None,
        "evictions": usage.evictions if usage else None,
    }
    if json:
        print_json({"shares": rows, "total": total})
        return
    heads = ("BYTES", "RECORDS", "NAMESPACE", "MODEL", "PRODUCER", "FIDELITY")
    table = [
        (
            format_size(row["bytes"]),
            f"{row['records']:,}",
            row["namespace"][:_SHORT_ID] or "(foreign)",
            row["label"] or "-",
            row["producer"] or "-",
            row["fidelity"] or "-",
        )
        for row in rows
    ]
    table.append((format_size(total["bytes"] or 0), f"{total['records']:,}", "total", "", "", ""))
    print_table(heads, table, right=("BYTES", "RECORDS"))
    if usage:
        of = f" of {format_size(usage.capacity_bytes)}" if usage.capacity_bytes else ""
        typer.echo(f"\n{format_size(usage.used_bytes)}{of} in use, {counted(usage.evictions, 'eviction')}")


def _shares(found: Survey) -> Iterable[dict[str, Any]]:
    """Descriptions count with their namespace, under no fidelity."""
    for space in found.spaces.values():
        shares: dict[tuple[str, str], list[Stat]] = defaultdict(list)
        for stat, key in space.records:
            shares["" if key.is_manifest else key.producer, key.fidelity].append(stat)
        for (identifier, fidelity), stats in shares.items():
            producer = space.producers.get(identifier)
            yield _share(stats, space.id, space.label, producer.name if producer else identifier, fidelity)
    if found.foreign:
        yield _share(found.foreign, "", "", "", "")


def _share(stats: Sequence[Stat], namespace: str, label: str, producer: str, fidelity: str) -> dict[str, Any]:
    return {
        "namespace": namespace,
        "label": label,
        "producer": producer,
        "fidelity": fidelity,
        "records": len(stats),
        "bytes": _nbytes(stats),
    }


def clear(
    url: UrlArgument = None,
    namespace: Annotated[
        str | None, typer.Option(help="Only the namespace whose id starts so.", metavar="PREFIX")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Delete the records of one namespace, or all of this program in a store.

    The store reuses their space; its files do not shrink.
    """
    with existing_store(target(url)) as backend:
        found = survey(backend)
        if namespace is None:
            chosen = list(found.spaces.values())
            stats = [record.stat for record in found.records]
        else:
            chosen = [_space(found, namespace)]
            stats = [record.stat for record in chosen[0].records]
        what = f"{counted(len(stats), 'record')}, {format_size(_nbytes(stats))}"
        if stats and not yes:
            _confirm(f"Delete {what} from {hide_secrets(target(url))}?")
        removed = _delete(backend, stats)
    if json:
        ids = [space.id for space in chosen]
        print_json({"namespaces": ids, "records": removed, "bytes": _nbytes(stats)})
    else:
        typer.echo(f"deleted {what}")


def _space(found: Survey, prefix: str) -> Space:
    """The one namespace whose id starts with ``prefix``. Raises ConfigError."""
    matches = [space for name, space in found.spaces.items() if prefix and name.startswith(prefix)]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(name[:_SHORT_ID] for name in sorted(found.spaces)) or "none"
    many = f"{len(matches)} namespaces start" if matches else "no namespace starts"
    raise ConfigError(f"{many} with {prefix!r}; there are: {names}")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _confirm(question: str) -> None:
    if not _is_terminal():
        raise ConfigError("this deletes records and there is no terminal to ask; repeat it with --yes")
    typer.confirm(question, abort=True)


class _Drop(NamedTuple):
    """What gc deletes for one reason. ``whole``: a namespace as such."""

    namespace: str
    label: str
    why: str
    whole: bool
    stats: list[Stat]


def gc(
    url: UrlArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Only say what would be dropped.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every record and check its header and payload.")
    ] = False,
    unknown: Annotated[
        bool,
        typer.Option(
            "--unknown",
            help="Also drop namespaces whose description is missing, or whose weights this machine has not.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Drop stale namespaces and broken records from a store.

    Without --verify only what shows without reading is found broken: cells that the namespace does not have,
    records too short for a header. What others keep in the store is left alone.
    """
    with existing_store(target(url)) as backend:
        shared = is_shared(target(url))
        drops = _unusable(backend, survey(backend), shared=shared, verify=verify, unknown=unknown)
        if not dry_run:
            for drop in drops:
                _delete(backend, drop.stats)
    records = sum(len(drop.stats) for drop in drops)
    nbytes = sum(_nbytes(drop.stats) for drop in drops)
    if json:
        dropped = [
            {
                "what": "namespace" if drop.whole else "records",
                "namespace": drop.namespace,
                "label": drop.label,
                "why": drop.why,
                "records": len(drop.stats),
                "bytes": _nbytes(drop.stats),
            }
            for drop in drops
        ]
        print_json({"dropped": dropped, "records": records, "bytes": nbytes, "dry_run": dry_run})
        return
    for drop in drops:
        size = f"{counted(len(drop.stats), 'record')}, {format_size(_nbytes(drop.stats))}"
        name = " ".join(filter(None, ("namespace", drop.namespace[:_SHORT_ID], drop.label)))
        typer.echo(f"{name}: {size}: {drop.why}" if drop.namespace else f"{size}: {drop.why}")
    verb = "would drop" if dry_run else "dropped"
    typer.echo(f"{verb} {counted(records, 'record')}, {format_size(nbytes)}" if drops else "nothing to drop")


def _unusable(backend: Listed, found: Survey, *, shared: bool, verify: bool, unknown: bool) -> list[_Drop]:
    drops = []
    kept: dict[str, Space] = {}
    for space in found.spaces.values():
        standing, why = space.standing(shared=shared)
        if standing is Standing.STALE or (unknown and standing is Standing.UNKNOWN):
            stats = [record.stat for record in space.records]
            drops.append(_Drop(space.id, space.label, f"{standing.value}: {why}", True, stats))
        else:
            kept[space.id] = space
    broken: dict[tuple[str, str], list[Stat]] = defaultdict(list)
    for space in kept.values():
        for stat, why in misfits(space):
            broken[space.id, why].append(stat)
    if verify:
        known = {stat.key for stats in broken.values() for stat in stats}
        # All in the order of the scan: where that is the order of use, reading them leaves it as it was.
        rest = [
            record
            for record in found.records
            if record.key.namespace in kept and not record.key.is_manifest and record.stat.key not in known
        ]
        for record, why in damaged(backend, found, rest):
            broken[record.key.namespace, why].append(record.stat)
    for (name, why), stats in broken.items():
        drops.append(_Drop(name, kept[name].label, f"broken: {why}", False, stats))
    return drops


def _delete(backend: Listed, stats: Sequence[Stat]) -> int:
    """Delete in batches, so that each is a short transaction; the answer is how many were there."""
    keys = [stat.key for stat in stats]
    return sum(backend.delete(keys[at : at + _DELETE_BATCH]) for at in range(0, len(keys), _DELETE_BATCH))


def _nbytes(stats: Iterable[Stat]) -> int:
    return sum(stat.nbytes for stat in stats)
