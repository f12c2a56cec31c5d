"""``serve``, ``status``, ``top`` and ``reopen``: running a daemon, looking at it, and changing its mind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer

from lmcache_sdk.api import PairStats, Stats
from lmcache_sdk.cli.output import counted, print_json, print_table
from lmcache_sdk.cli.settings import group_id
from lmcache_sdk.config import default_socket, format_size, load_config
from lmcache_sdk.errors import BackendUnavailable, ConfigError
from lmcache_sdk.keys import EXACT
from lmcache_sdk.observe.logs import log_to_stderr

SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket", readable=False, help="The daemon's socket; by default the configured one, else this user's."
    ),
]


def serve(
    socket: Annotated[str | None, typer.Option(help="Where to listen. [default: in $XDG_RUNTIME_DIR]")] = None,
    pool: Annotated[str | None, typer.Option(help="Memory for chunks, like 20GiB. [default: 1GiB]")] = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="URL of a store below the pool, with options behind #; repeat it, fastest first."),
    ] = None,
    eviction: Annotated[str | None, typer.Option(help="What gives room first: lru or s3fifo. [default: lru]")] = None,
    group: Annotated[str | None, typer.Option(help="Members of this group may use the daemon, too.")] = None,
    require_salt: Annotated[
        bool | None, typer.Option("--require-salt", help="Serve only requests that have a cache salt.")
    ] = None,
    keep_pool: Annotated[
        bool | None,
        typer.Option("--keep-pool/--no-keep-pool", help="Leave the pool for the next start. [default: yes]"),
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Serve /metrics and /healthz there.")] = None,
    metrics_host: Annotated[
        str | None, typer.Option(help="Their address; beyond loopback only with token and TLS. [default: 127.0.0.1]")
    ] = None,
    metrics_token_file: Annotated[str | None, typer.Option(help="The token that they ask for.")] = None,
    metrics_cert: Annotated[str | None, typer.Option(help="Their TLS certificate, PEM.")] = None,
    metrics_key: Annotated[str | None, typer.Option(help="Its key, PEM.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings.")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING … [default: INFO]")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json. [default: text]")] = None,
) -> None:
    """Run a daemon: one cache for all engines of this machine, which outlives them.

    It ends on SIGTERM or Ctrl-C, after writing to the tiers what is not there yet. The pool is kept.
    """
    settings = load_config(
        {
            "socket": socket,
            "pool_bytes": pool,
            "tiers": tier or None,
            "eviction": eviction,
            "group": group,
            "require_salt": require_salt,
            "keep_pool": keep_pool,
            "metrics_port": metrics_port,
            "metrics_host": metrics_host,
            "metrics_token_file": metrics_token_file,
            "metrics_cert": metrics_cert,
            "metrics_key": metrics_key,
            "log_level": log_level,
            "log_format": log_format,
        },
        file=config,
    )
    from lmcache_sdk.daemon.serve import serve as run

    log_to_stderr(settings.log_level, settings.log_format)
    run(settings, group_id(settings.group))


def status(
    socket: SocketOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a daemon holds, and for whom."""
    path = _socket(socket)
    seen = _look(path)
    if json:
        print_json({"socket": str(path), "boot": seen.boot, "stats": seen.stats, **seen.details})
        return
    for line in _overview(path, seen):
        typer.echo(line)
    details = seen.details
    engines = {client["engine"] for client in details["clients"]}
    _table(
        ("TIER", "RECORDS", "USED", "OF", "WRITE", "QUEUED", "DROPPED", "BREAKER"),
        [
            (
                tier.name,
                f"{tier.records:,}",
                format_size(tier.used_bytes),
                format_size(tier.capacity_bytes) if tier.capacity_bytes else "-",
                tier.write,
                format_size(tier.unwritten_bytes),
                f"{seen.total('lmcache_dropped_chunks_total', where=tier.name):,.0f}",
                tier.breaker,
            )
            for tier in seen.stats.tiers
        ],
    )
    _table(
        ("PID", "ENGINE", "MODEL", "HELD"),
        [(str(c["pid"]), c["engine"], c["model"] or "-", format_size(c["held_bytes"])) for c in details["clients"]],
    )
    _table(
        ("NAMESPACE", "MODEL", "PRODUCER", "CHUNKS", "BYTES"),
        [
            (
                space["namespace"],
                space["model"] or "-",
                space["producer"] + ("" if space["fidelity"] == EXACT else f" {space['fidelity']}"),
                f"{space['chunks']:,}",
                format_size(space["chunks"] * space["chunk_bytes"]),
            )
            for space in details["namespaces"]
            if space["chunks"] or (space["producer"] in engines and space["fidelity"] == EXACT)
        ],
    )
    # A store hears of all that have ever stored in its tiers.
    present = engines | {space["producer"] for space in details["namespaces"] if space["chunks"]}
    pairs = [pair for pair in seen.stats.pairs if pair.state == "closed" or present.issuperset(pair.producers)]
    _table(
        ("PRODUCERS", "STATE", "COMPARED", "FAILED", "SERVED TO", "ERROR"),
        [
            (
                " and ".join(pair.producers),
                pair.state,
                f"{pair.compared:,}",
                f"{pair.failed:,}",
                f"{pair.depth:,}",
                ", ".join(f"{role} {error:.2%}" for role, error in pair.worst.items()) or pair.why or "-",
            )
            for pair in pairs
        ],
    )
    if more := len(seen.stats.pairs) - len(pairs):
        typer.echo(f"\n{counted(more, 'pair')} more with producers that have neither clients nor chunks in the pool")
    _table(
        ("TENANT", "BYTES"),
        [(name or "(none)", format_size(nbytes)) for name, nbytes in sorted(details["tenants"].items())],
    )


def top(
    socket: SocketOption = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 1.0,
    iterations: Annotated[int, typer.Option(help="End after so many; 0 = never.", min=0)] = 0,
) -> None:
    """Watch a daemon: what happens each second. It waits for a daemon that restarts. Ends with Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    path = _socket(socket)
    before, then = _look(path), time.monotonic()
    console = Console(highlight=False)
    # In a terminal one screen that changes, elsewhere one block a look.
    with Live(console=console, auto_refresh=False, transient=False) as live:
        done = 0
        while not iterations or done < iterations:
            time.sleep(interval)
            done += 1
            try:
                seen, now = _look(path), time.monotonic()
            except BackendUnavailable as error:
                text = str(error)
            else:
                text = "\n".join(_activity(before if before.boot == seen.boot else seen, seen, now - then))
                before, then = seen, now
            if console.is_terminal:
                live.update(Text(text), refresh=True)
            else:
                typer.echo(text)


def reopen(
    one: Annotated[str, typer.Argument(help="A producer, by its name as status shows it, or the first part of that.")],
    other: Annotated[str, typer.Argument(help="The other one.")],
    namespace: Annotated[
        str | None, typer.Option(help="In the namespace whose id starts so.", metavar="PREFIX")
    ] = None,
    socket: SocketOption = None,
) -> None:
    """Compare two producers anew whose KV differed, so that they may read each other's again.

    What the wrong one has stored is still there: have that engine remove it first. And restart the other one, which may
    hold what it has loaded of it.
    """
    path = _socket(socket)
    closed = [pair for pair in _look(path).stats.pairs if pair.state == "closed"]
    chosen = [pair for pair in closed if pair.namespace.startswith(namespace or "") and _is_of(pair, one, other)]
    if len(chosen) > 1:  # a name may begin another one
        chosen = [pair for pair in chosen if set(pair.producers) == {one, other}] or chosen
    if len(chosen) != 1:
        found = f"{len(chosen)} closed pairs have" if chosen else "no closed pair has"
        more = "; name them in full, or add --namespace" if chosen else ""
        there = ", ".join(f"{' and '.join(pair.producers)} in {pair.namespace}" for pair in chosen or closed) or "none"
        raise ConfigError(f"{found} names that start with {one!r} and {other!r}{more}; there are: {there}")
    from lmcache_sdk.daemon.serve import reopen as run

    (pair,) = chosen
    run(path, pair.namespace, pair.producers)
    typer.echo(f"{' and '.join(pair.producers)} are compared anew")


def _is_of(pair: PairStats, one: str, other: str) -> bool:
    first, second = pair.producers
    return (first.startswith(one) and second.startswith(other)) or (second.startswith(one) and first.startswith(other))


class Seen(NamedTuple):
    """One look at a daemon."""

    boot: str
    stats: Stats
    details: Mapping[str, Any]

    def by(self, metric: str, label: str) -> dict[str, float]:
        """The values of a metric with one label, by that label's value."""
        start = f'{metric}{{{label}="'
        return {
            name[len(start) : name.index('"', len(start))]: value
            for name, value in self.stats.counters.items()
            if name.startswith(start)
        }

    def total(self, metric: str, **labels: str) -> float:
        """The sum of a metric over all its labels but the given ones."""
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        return sum(
            value
            for name, value in self.stats.counters.items()
            if name.partition("{")[0] == metric and all(text in name for text in wanted)
        )


def _look(path: Path) -> Seen:
    """Raises BackendUnavailable, BackendFormatError."""
    from lmcache_sdk.daemon.serve import ask

    figures = ask(path)
    details = {name: msgspec.msgpack.decode(raw) for name, raw in figures.details.items()}
    return Seen(figures.boot, figures.stats, details)


def _overview(path: Path, seen: Seen) -> Iterator[str]:
    stats, pool, details = seen.stats, seen.stats.pool, seen.details
    yield f"daemon    unix://{path}, process {details['pid']}, life {seen.boot}"
    used, free, largest, quarantined = map(
        format_size, (pool.used_bytes, pool.free_bytes, pool.largest_free_bytes, pool.quarantined_bytes)
    )
    yield (
        f"pool      {format_size(pool.total_bytes)}: {used} used, {free} free (largest piece {largest}), "
        f"{quarantined} quarantined"
    )
    nodes = [segment["node"] for segment in details["segments"] if segment["node"] is not None]
    if nodes:
        yield f"          NUMA nodes of its segments: {', '.join(map(str, nodes))}"
    yield f"holds     {counted(stats.chunks, 'chunk')}, {counted(stats.leases, 'lease')}"
    lookups = seen.by("lmcache_lookups_total", "result")
    sources = seen.by("lmcache_lookup_tokens_total", "source")
    tokens = ", ".join(f"{name} {count:,.0f}" for name, count in sources.items())
    yield f"lookups   {lookups.get('hit', 0):,.0f} hits, {lookups.get('miss', 0):,.0f} misses; tokens: {tokens}"
    yield f"events    up to {details['events']['sequence']}"
    if details["earlier_clients"]:
        yield f"earlier   {counted(details['earlier_clients'], 'client')} of an earlier life may still hold memory"


def _activity(before: Seen, seen: Seen, seconds: float) -> Iterator[str]:
    def rate(metric: str, **labels: str) -> float:
        return max(0.0, seen.total(metric, **labels) - before.total(metric, **labels)) / seconds

    def size_rate(metric: str, **labels: str) -> str:
        return f"{format_size(rate(metric, **labels))}/s"

    pool, stats = seen.stats.pool, seen.stats
    used = f"{format_size(pool.used_bytes)} of {format_size(pool.total_bytes)}"
    held = (counted(stats.chunks, "chunk"), counted(stats.leases, "lease"))
    clients = counted(len(seen.details["clients"]), "client")
    yield f"pool      {used} ({pool.used_bytes / max(1, pool.total_bytes):.0%}), {', '.join(held)}, {clients}"
    hits = rate("lmcache_lookups_total", result="hit")
    yield f"lookups   {rate('lmcache_lookups_total'):,.1f}/s, {hits:,.1f}/s of them hits"
    metric = "lmcache_lookup_tokens_total"
    tokens = (f"{name} {rate(metric, source=name):,.0f}/s" for name in seen.by(metric, "source"))
    yield f"tokens    {', '.join(tokens)}"
    yield f"engines   load {size_rate('lmcache_leased_bytes_total')}, store {size_rate('lmcache_stored_bytes_total')}"
    evicted = rate("lmcache_removed_chunks_total", reason="evicted")
    yield f"chunks    evicted {evicted:,.1f}/s, not stored {rate('lmcache_dropped_chunks_total'):,.1f}/s"
    for tier in stats.tiers:
        moved = (
            f"{way} {size_rate('lmcache_tier_bytes_total', tier=tier.name, direction=way)}" for way in ("read", "write")
        )
        errors = rate("lmcache_tier_errors_total", tier=tier.name)
        dropped = rate("lmcache_dropped_chunks_total", where=tier.name)
        yield (
            f"{tier.name:9} {', '.join(moved)}, {format_size(tier.unwritten_bytes)} to write, "
            f"{dropped:,.1f} dropped/s, {errors:,.1f} errors/s, breaker {tier.breaker}"
        )


_NUMBERS = ("RECORDS", "USED", "OF", "QUEUED", "DROPPED", "HELD", "CHUNKS", "BYTES", "COMPARED", "FAILED", "SERVED TO")


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if rows:
        typer.echo()
        print_table(heads, rows, right=_NUMBERS)


def _socket(socket: Path | None) -> Path:
    if socket is None:
        configured = load_config().socket
        return Path(configured) if configured else default_socket()
    if str(socket).startswith("unix:"):
        raise ConfigError(f"--socket takes a path, not a URL; write {str(socket).removeprefix('unix:')}")
    return socket
