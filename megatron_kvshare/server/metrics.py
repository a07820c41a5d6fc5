"""What the server counts and times, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from megatron_kvshare.serving.engine import EngineStats
from megatron_kvshare.serving.request import Output

_GAUGES = {
    "running": "Requests in the batch",
    "waiting": "Requests that wait for a place in the batch or in the cache",
    "pages": "Pages of the cache",
    "free_pages": "Pages of the cache that can be taken",
    "cache_bytes": "Bytes of the cache on this rank",
}
_COUNTERS = {
    "preempted": "Times that a running request made room for others",
    "prompt_tokens": "Tokens of prompts",
    "generated_tokens": "Tokens generated",
    "reused_tokens": "Tokens of prompts whose keys and values were still there",
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Timing:
    """When a request was opened, and when it brought tokens last."""

    def __init__(self) -> None:
        self.opened = time.monotonic()
        self.last: float | None = None


class Metrics:
    """In a registry of their own; ``stats`` are those of the engine after its last step."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, stats: EngineStats) -> None:
        self.stats = stats
        self._registry = registry = CollectorRegistry()
        registry.register(_OfEngine(self))
        ProcessCollector(registry=registry)
        self.responses = Counter(
            "kvshare_http_responses", "HTTP responses", ["path", "status"], registry=registry
        )
        self._ended = Counter(
            "kvshare_requests", "Requests that have ended", ["reason"], registry=registry
        )
        self._first = Histogram(
            "kvshare_time_to_first_token_seconds",
            "From the arrival of a request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._next = Histogram(
            "kvshare_time_per_token_seconds",
            "From one token of a request to the next",
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "kvshare_request_seconds",
            "From the arrival of a request to its last token",
            buckets=_SECONDS,
            registry=registry,
        )

    def saw(self, output: Output, timing: Timing) -> None:
        """One output of the engine."""
        now = time.monotonic()
        if output.tokens:
            if timing.last is None:
                self._first.observe(now - timing.opened)
            else:
                self._next.observe((now - timing.last) / len(output.tokens))
            timing.last = now
        if output.finished is not None:
            self._ended.labels(output.finished.value).inc()
            self._whole.observe(now - timing.opened)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    """The engine's own numbers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        stats = self._metrics.stats
        for name, about in _GAUGES.items():
            yield GaugeMetricFamily(f"kvshare_{name}", about, getattr(stats, name))
        for name, about in _COUNTERS.items():
            yield CounterMetricFamily(f"kvshare_{name}", about, getattr(stats, name))
