"""The metric objects of one store, in a registry of their own; exposition is the daemon's.

Counters end in ``_total``; bytes and seconds are base units; hits are counted beside queries, never as a rate. What
each means is in ``docs/metrics.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

_CALL_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_RESIDENCE_SECONDS = (1.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 86400.0, 604800.0)


class Total(NamedTuple):
    """How something that the core counts is shown: its counters are ``name`` or, with a label, ``name.value``."""

    metric: str
    help: str
    label: str = ""


TOTALS = {
    "stored_chunks": Total("lmcache_stored_chunks", "Chunks that engines have stored"),
    "stored_bytes": Total("lmcache_stored_bytes", "Pool memory of the chunks that engines have stored"),
    "leased_bytes": Total("lmcache_leased_bytes", "Pool memory leased to engines, to be loaded"),
    "foreign_chunks": Total("lmcache_foreign_chunks", "Chunks of other producers leased to engines"),
    "removed_chunks": Total("lmcache_removed_chunks", "Chunks that left the pool", "reason"),
    "store_dropped_chunks": Total("lmcache_dropped_chunks", "Chunks not stored, or not written to a tier", "where"),
    "written_chunks": Total("lmcache_written_chunks", "Chunks written to a tier", "tier"),
    "short_lived_chunks": Total(
        "lmcache_short_lived_chunks", "Chunks gone from the pool before their write to a tier was due", "tier"
    ),
    "negative_hits": Total("lmcache_negative_hits", "Times that a tier was not asked, as it had just said no", "tier"),
    "abandoned_probes": Total("lmcache_abandoned_probes", "Times that a tier was passed over, as it was late", "tier"),
    "abandoned_jobs": Total("lmcache_abandoned_jobs", "Jobs on a tier past their deadline", "tier"),
}


class Metrics:
    """Attributes are the metrics; ``registry`` collects them.

    Args:
        totals: what the core has counted, see :data:`TOTALS`; read at each collection, so that counting costs nothing.
    """

    def __init__(self, totals: Callable[[], Mapping[str, int]] = dict) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _CALL_SECONDS) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.lookups = counter("lmcache_lookups", "Lookups that were answered", "result")
        self.lookup_tokens = counter("lmcache_lookup_tokens", "Tokens looked up, by where they were found", "source")
        self.lookup_seconds = seconds("lmcache_lookup_seconds", "From a lookup to its answer")
        self.overlap_chunks = counter("lmcache_overlap_chunks", "Chunks of two producers that were compared", "result")
        self.tier_bytes = counter("lmcache_tier_bytes", "Bytes read from and written to a tier", "tier", "direction")
        self.tier_seconds = seconds("lmcache_tier_seconds", "Time of one job on a tier", "tier", "direction")
        self.tier_errors = counter("lmcache_tier_errors", "Calls of a tier that failed", "tier", "error")
        self.record_failures = counter(
            "lmcache_record_failures", "Records that did not check out: a miss", "tier", "reason"
        )
        self.residence_seconds = seconds(
            "lmcache_residence_seconds",
            "How long chunks that left the pool had been readable",
            "reason",
            buckets=_RESIDENCE_SECONDS,
        )
        self.pool_bytes = gauge("lmcache_pool_bytes", "Pool memory by state; the states add up to the pool", "state")
        self.pool_largest_free_bytes = gauge("lmcache_pool_largest_free_bytes", "The largest free piece of the pool")
        self.pool_chunks = gauge("lmcache_pool_chunks", "Chunks in the pool")
        self.leases = gauge("lmcache_leases", "Leases not yet released")
        self.pairs = gauge("lmcache_pairs", "Pairs of producers, by whether each reads the other's chunks", "state")
        self.clients = gauge("lmcache_clients", "Connected engine processes")
        self.tier_records = gauge("lmcache_tier_records", "Records in a tier, where it can tell", "tier")
        self.tier_used_bytes = gauge("lmcache_tier_used_bytes", "Bytes in a tier, where it can tell", "tier")
        self.tier_capacity_bytes = gauge("lmcache_tier_capacity_bytes", "What fits a tier; 0 = unknown", "tier")
        self.tier_breaker_open = gauge("lmcache_tier_breaker_open", "1 = the tier failed and is left alone", "tier")
        self.tier_unwritten_bytes = gauge("lmcache_tier_unwritten_bytes", "What is to be written to a tier", "tier")
        registry.register(_Totals(totals))

    def values(self) -> dict[str, float]:
        """All samples as ``name{label="value"}`` -> number, without histogram buckets."""
        found = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
                    found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found


class _Totals(Collector):
    """Shows as counters what the core counts."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterable[CounterMetricFamily]:
        counted = self._read()
        for name, total in TOTALS.items():
            family = CounterMetricFamily(total.metric, total.help, labels=[total.label] if total.label else None)
            if not total.label:
                family.add_metric([], counted.get(name, 0))
            for key, value in counted.items():
                if total.label and key.startswith(f"{name}."):
                    family.add_metric([key[len(name) + 1 :]], value)
            yield family

    def describe(self) -> Iterable[CounterMetricFamily]:
        return ()  # else registering would collect, before there is a core
