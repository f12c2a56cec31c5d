"""What the connector counts, the way vLLM collects, logs and exposes it."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

# Name -> help; all are totals. Those that a worker counts are summed over the workers.
FIGURES = {
    "load_requests": "Requests whose prefix was loaded, or was to be",
    "loaded_tokens": "Tokens loaded, by each worker",
    "load_seconds": "Time from a load's beginning to its end, by each worker",
    "load_failures": "Loads of which not all came; vLLM computed the rest",
    "store_requests": "Pieces of requests that were offered to the cache",
    "lookups_given_up": "Lookups that took longer than computing is worth",
}


class ConnectorStats(KVConnectorStats):
    """``data``: numbers by the names of :data:`FIGURES`."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        for name, number in other.data.items():
            self.data[name] = self.data.get(name, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(number, 3) for name, number in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class ConnectorPromMetrics(KVConnectorPromMetrics):
    """``vllm:lmcache_sdk_*`` counters, one a figure and engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=f"vllm:lmcache_sdk_{name}", documentation=text, labelnames=labelnames)
            for name, text in FIGURES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, number in transfer_stats_data.items():
            if name in self._counters and number > 0:
                self._counters[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(number)
