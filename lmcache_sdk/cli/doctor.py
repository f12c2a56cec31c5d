"""``doctor``: what was chosen and why, what is broken and how to mend it, what the machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from lmcache_sdk import __version__
from lmcache_sdk.backend import Scan, Usage, UsageReport, install_command
from lmcache_sdk.cli.inventory import Standing, survey
from lmcache_sdk.cli.measure import Speed, device_speeds, memory_speeds, store_speeds
from lmcache_sdk.cli.output import counted, print_json
from lmcache_sdk.cli.settings import setting_texts
from lmcache_sdk.cli.target import CLOSE_TIMEOUT_S, address, is_shared, local_path, missing_store
from lmcache_sdk.config import Config, default_url, format_size, hide_secrets, settle
from lmcache_sdk.errors import BackendLocked, ConfigError, LMCacheSDKError
from lmcache_sdk.kernels import DeviceKernels, describe_kernels, kernels_for
from lmcache_sdk.pool import extent_bytes
from lmcache_sdk.spec import CellGrid, namespace_of, weights_fingerprint
from lmcache_sdk.tiers import open_tier

_DEPENDENCIES = ("lmdb", "msgspec", "numpy", "prometheus-client", "pyyaml", "typer", "xxhash")
_ENGINES = ("torch", "transformers", "vllm", "sglang")
_PLUGINS = {"backend": "lmcache_sdk.backends", "codec": "lmcache_sdk.codecs", "command": "lmcache_sdk.commands"}
_PROMPT_TOKENS = 4096  # a pool that does not hold one prompt of this length is of little use

Status = Literal["ok", "warn", "bad"]


class Finding(msgspec.Struct):
    """One line of the report.

    Attributes:
        status: ``bad`` = does not work, ``warn`` = works worse than it could.
        fix: what to do about it.
        facts: numbers for scripts.
    """

    topic: str
    name: str
    text: str
    status: Status = "ok"
    fix: str = ""
    facts: dict[str, Any] = {}


def doctor(
    url: Annotated[str | None, typer.Option(help="The cache; by default the configured one.")] = None,
    pool: Annotated[str | None, typer.Option(help="Host memory for chunks, like 20GiB.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model directory: is it served, and how many tokens fit?")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure speeds; takes seconds.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what was chosen and why, what is wrong and how to mend it, and what this machine can do.

    Ends with status 1 if something is broken. A store that does not exist yet is not made.
    """
    findings: list[Finding] = []
    topic = ""
    for finding in _examination(url, pool, model, measure):
        findings.append(finding)
        if json:
            continue
        if finding.topic != topic:
            typer.echo(f"{'' if not topic else chr(10)}{finding.topic}")
            topic = finding.topic
        typer.echo(f"  {finding.status:4}  {finding.name:20}  {finding.text}")
        if finding.fix:
            typer.echo(f"        {'':20}  → {finding.fix}")
    bad, warned = (sum(f.status == status for f in findings) for status in ("bad", "warn"))
    if json:
        print_json({"ok": not bad, "findings": findings})
    else:
        typer.echo(f"\n{counted(bad, 'problem')}, {counted(warned, 'warning')}")
    if bad:
        raise typer.Exit(1)


def _examination(url: str | None, pool: str | None, model: Path | None, measure: bool) -> Iterator[Finding]:
    yield from _versions()
    flags = {"url": url, "pool_bytes": pool}
    config, sources, problems = settle(flags)
    if problems:
        fix = "correct that setting; its default is used below"
        yield Finding("settings", "configuration", "; ".join(problems), "bad", fix)
    else:
        for name, text in setting_texts(config).items():
            yield Finding("settings", name, f"{text}  ({sources[name]})", facts={"source": sources[name]})
    yield from _machine(config.pool_bytes)
    yield from _plugins()
    chosen = config.url or default_url()
    store = list(_safely("store", lambda: _store(chosen)))
    yield from store
    if model:
        capacity = next((f.facts["capacity_bytes"] for f in store if "capacity_bytes" in f.facts), 0)
        yield from _safely("model", lambda: _model(model, config, capacity))
    if measure:
        yield from _safely("speed", lambda: _speeds(chosen))


def _safely(topic: str, examine: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What cannot be examined is a finding, too."""
    try:
        yield from examine()
    except (LMCacheSDKError, OSError) as error:
        yield Finding(topic, topic, str(error), "bad")


def _versions() -> Iterator[Finding]:
    python = f"Python {platform.python_version()}, {platform.system()} {platform.release()} {platform.machine()}"
    yield Finding("versions", "lmcache-sdk", f"{__version__}, {python}")
    for name, packages in (("depends on", _DEPENDENCIES), ("engines", _ENGINES)):
        yield Finding("versions", name, ", ".join(f"{p} {_version(p)}" for p in packages))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _machine(pool_bytes: int) -> Iterator[Finding]:
    yield Finding("machine", "processors", str(len(os.sched_getaffinity(0))))
    available = _available_memory()
    memory = Finding("machine", "memory", f"{format_size(available)} available", facts={"available_bytes": available})
    if pool_bytes > available:
        memory.status = "warn"
        memory.text += f", less than pool_bytes ({format_size(pool_bytes)})"
        memory.fix = "lower pool_bytes: the pool takes its memory as it fills"
    yield memory
    shm = Path("/dev/shm")  # noqa: S108  the place itself is examined, nothing is written there
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        yield Finding(
            "machine", str(shm), f"{format_size(usage.free)} free of {format_size(usage.total)}", facts=usage._asdict()
        )


def _available_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container if that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) << 10
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return available if limit == "max" else min(available, int(limit) - int(used))
    except (OSError, ValueError):
        return available


def _plugins() -> Iterator[Finding]:
    for kind, source in describe_kernels().items():
        finding = Finding("installed", f"kernels {kind}", source)
        try:
            kernels_for(kind)
        except LMCacheSDKError as error:
            finding.status = "bad" if kind == "cpu" else "warn"
            if str(error) != source:  # else nothing could be chosen, and that is the reason
                finding.text = f"{source}; cannot be used: {error}"
            finding.fix = "mend that, or uninstall the package if there is no such device here"
        yield finding
    for kind, group in _PLUGINS.items():
        for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
            yield _plugin(kind, entry)


def _plugin(kind: str, entry: EntryPoint) -> Finding:
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown package"
    finding = Finding("installed", f"{kind} {entry.name}", f"{entry.value} ({package})")
    try:
        entry.load()
    except ImportError as error:
        install = install_command(entry)
        if install and isinstance(error, ModuleNotFoundError):  # nobody needs all of them
            finding.text, finding.fix = f"not installed ({package})", f"{install}, if you want to use it"
        else:
            finding.status, finding.text = "warn", f"{finding.text} cannot be used: {error}"
            finding.fix = install or "install what it needs, if you want to use it"
    except Exception as error:  # noqa: BLE001  other people's code: that it fails is the finding
        finding.status, finding.text = "bad", f"{finding.text} fails: {type(error).__name__}: {error}"
        finding.fix = f"update or remove {package}"
    return finding


def _store(url: str) -> Iterator[Finding]:
    parsed = address(url)
    if missing := missing_store(parsed):
        yield _absent(missing)
    else:
        try:
            backend = open_tier(url).backend
        except BackendLocked as error:
            yield Finding("store", "in use", str(error))
        else:
            try:
                yield _opened(url, backend.usage() if isinstance(backend, Usage) else None)
                if isinstance(backend, Scan):
                    spaces = survey(backend).spaces.values()
                    stale = sum(space.standing(shared=is_shared(url))[0] is Standing.STALE for space in spaces)
                    yield _namespaces(url, len(spaces), stale)
            finally:
                backend.close(CLOSE_TIMEOUT_S)
    place = local_path(parsed)
    if place:
        yield _disk(_nearest(place))


def _opened(url: str, usage: UsageReport | None) -> Finding:
    finding = Finding("store", "opens", hide_secrets(url))
    if usage:
        of = f" of {format_size(usage.capacity_bytes)}" if usage.capacity_bytes else ""
        finding.text += f": {counted(usage.records, 'record')}, {format_size(usage.used_bytes)}{of}"
        finding.facts = usage._asdict()
    return finding


def _absent(place: Path) -> Finding:
    finding = Finding("store", "none yet", f"{place} is made when the cache is first used")
    parent = _nearest(place)
    if not os.access(parent, os.W_OK | os.X_OK):
        finding.status, finding.text = "bad", f"{place} cannot be made: {parent} is not writable for this user"
        finding.fix = "choose another path, or give this user the right to write there"
    elif place.parent != parent and not place.exists():
        finding.status, finding.text = "warn", f"{place} cannot be made yet: {place.parent} does not exist"
        finding.fix = f"mkdir -p {place.parent}"
    return finding


def _namespaces(url: str, count: int, stale: int) -> Finding:
    finding = Finding("store", "namespaces", f"{count}, {stale} of them stale")
    if stale:
        finding.status, finding.fix = "warn", f"lmcache-sdk gc '{hide_secrets(url)}'"
    return finding


def _disk(directory: Path) -> Finding:
    usage = shutil.disk_usage(directory)
    finding = Finding("store", "disk", f"{format_size(usage.free)} free in {directory}", facts=usage._asdict())
    if usage.free < usage.total // 20:
        finding.status = "warn"
        finding.fix = "free some space; the store evicts where the disk is full, whatever its size says"
    return finding


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest directory above it that is there."""
    return next(p for p in (path, *path.parents) if p.is_dir())


def _model(directory: Path, config: Config, capacity_bytes: int) -> Iterator[Finding]:
    fingerprint = weights_fingerprint(directory)
    try:
        model = msgspec.json.decode((directory / "config.json").read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{directory / 'config.json'} is no configuration of a model: {error}") from error
    text = model.get("text_config") or model
    dtype = str(
        text.get("dtype") or text.get("torch_dtype") or model.get("dtype") or model.get("torch_dtype") or "float32"
    )
    namespace = namespace_of(
        model,
        fingerprint=fingerprint,
        dtype=dtype,
        chunk_tokens=config.chunk_tokens,
        grid=CellGrid(config.layers_per_cell, config.heads_per_cell),
    )
    spec = namespace.spec
    yield Finding("model", "is served", f"{model.get('model_type', directory.name)}, KV in {dtype}")
    yield Finding("model", "namespace", namespace.id, facts={"fingerprint": fingerprint})
    chunk = f"{format_size(spec.chunk_bytes)} a chunk of {spec.chunk_tokens} tokens"
    facts = {"token_bytes": spec.token_bytes, "chunk_bytes": spec.chunk_bytes}
    yield Finding("model", "KV", f"{format_size(spec.token_bytes)} a token, {chunk}", facts=facts)
    each = sum(extent_bytes(cell.nbytes) for cell in spec.cells)
    tokens = config.pool_bytes // each * spec.chunk_tokens
    fit = Finding("model", "pool holds", f"{tokens:,} tokens", facts={"tokens": tokens})
    if tokens < _PROMPT_TOKENS:
        need = -(-_PROMPT_TOKENS // spec.chunk_tokens) * each
        fit.status = "warn" if tokens else "bad"
        fit.text += f", less than one prompt of {_PROMPT_TOKENS:,}"
        fit.fix = f"raise pool_bytes to at least {-(-need >> 20)}MiB"
    yield fit
    if capacity_bytes:
        tokens = capacity_bytes // each * spec.chunk_tokens
        yield Finding("model", "store holds", f"about {tokens:,} tokens", facts={"tokens": tokens})


def _speeds(url: str) -> Iterator[Finding]:
    def finding(speed: Speed) -> Finding:
        found = Finding(
            "speed",
            speed.name,
            f"{speed.measured:5.1f} {speed.unit}, {speed.share:4.0%} of {speed.ceiling_name} "
            f"({speed.ceiling:.1f} {speed.unit})",
            facts=msgspec.to_builtins(speed),
        )
        if speed.share < speed.expected:
            found.status = "warn"
            found.fix = "repeat it while nothing else runs; if it stays so low, report it"
        return found

    yield from map(finding, memory_speeds())
    for kind in describe_kernels():
        try:
            kernels = kernels_for(kind)
        except LMCacheSDKError:
            continue  # that has been said
        if isinstance(kernels, DeviceKernels):
            try:
                yield from map(finding, device_speeds(kernels, f"{kind}:0"))
            except Exception as error:  # noqa: BLE001 - other people's code and devices: that one fails is the finding
                yield Finding("speed", f"{kind}:0", f"not measured: {type(error).__name__}: {error}", "warn")
    parsed = address(url)
    place = local_path(parsed)
    if place is None:
        return
    beside = place if place.is_mount() else _nearest(place.parent)  # in any case on the store's own disk
    if os.access(beside, os.W_OK | os.X_OK):
        yield from map(finding, store_speeds(parsed.scheme, parsed.text.partition("?")[2], beside))
    else:
        yield Finding("speed", "store", f"not measured: {beside} is not writable for this user", "warn")


__all__ = ["Finding", "doctor"]
