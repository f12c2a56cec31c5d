"""The metric objects of one store, in a registry of their own; exposition is the daemon's.

Counters end in ``_total``; bytes and seconds are base units; hits are counted beside queries, never as a rate.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Metrics:
    """Attributes are the metrics; ``registry`` collects them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.lookups = Counter("lmcache_lookups", "Finished lookups", ["result"], registry=registry)
        self.lookup_tokens = Counter(
            "lmcache_lookup_tokens", "Tokens of full chunks looked up", ["source"], registry=registry
        )
        self.chunks = Counter("lmcache_chunks", "Chunks by what happened to them", ["event"], registry=registry)
        self.tier_bytes = Counter("lmcache_tier_bytes", "Bytes moved", ["tier", "direction"], registry=registry)
        self.tier_seconds = Histogram(
            "lmcache_tier_seconds",
            "Time of one job on a tier",
            ["tier", "direction"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.tier_errors = Counter("lmcache_tier_errors", "Failed calls", ["tier", "error"], registry=registry)
        self.record_failures = Counter(
            "lmcache_record_failures",
            "Records that did not check out: a miss",
            ["tier", "reason"],
            registry=registry,
        )
        self.pool_bytes = Gauge("lmcache_pool_bytes", "Pool memory by state", ["state"], registry=registry)
        self.leases = Gauge("lmcache_leases", "Leases not yet released", registry=registry)

    def values(self) -> dict[str, float]:
        """All samples as ``name{label="value"}`` -> number, without histogram buckets."""
        found = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
                    found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found
