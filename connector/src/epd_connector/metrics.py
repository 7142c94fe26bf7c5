"""Counters of the connector, and the optional HTTP port that serves them in Prometheus' text format.

They are kept without prometheus_client's own value classes: with several API servers vLLM turns those into files that
would mix with vLLM's metrics. The scheduler process sends its counters to the worker that serves the port.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from .config import ConfigError

MISS_REASONS = (
    "absent",
    "corrupt",
    "store_error",
    "store_down",
    "too_large",
    "slab_full",
    "link_down",
    "link_behind",
    "wrong_rows",
    "unsupported",
)
PUBLISH_FAILURES = ("no_space", "slab_full", "store_down", "store_error", "too_large", "unsupported")

COUNTERS: dict[str, tuple[str, tuple[str, tuple[str, ...]] | None]] = {
    "epd_ec_hits": ("Items that vLLM took from the store instead of encoding them.", None),
    "epd_ec_misses": ("Look-ups that ended without an embedding.", ("reason", MISS_REASONS)),
    "epd_ec_local_encodes": ("Items that a consumer encoded itself.", None),
    "epd_ec_deadlines": ("Requests that stopped waiting for the store and went on.", None),
    "epd_ec_published": ("Items that a producer made visible in the store.", None),
    "epd_ec_republished": ("Of these, items the store had lost and vLLM's encoder cache still held.", None),
    "epd_ec_publish_failures": ("Items that could not be published.", ("reason", PUBLISH_FAILURES)),
    "epd_ec_barrier_timeouts": ("Steps that ended before all their items were published.", None),
    "epd_ec_put_bytes": ("Bytes written to the store.", None),
    "epd_ec_get_bytes": ("Bytes read from the store.", None),
    "epd_ec_hook_errors": ("Exceptions kept from reaching the engine; each one is a defect.", None),
}
SUMMARIES = {
    "epd_ec_put_seconds": "Time of one put, with retries.",
    "epd_ec_get_seconds": "Time of one read with its verification.",
    "epd_ec_barrier_seconds": "Time that the model thread waited for publishing, per step with items.",
    "epd_ec_deferral_seconds": "Time that a request waited for its items.",
    "epd_ec_stall_seconds": "Time that the scheduler stood still for an item, where vLLM cannot defer the request.",
}
HISTOGRAMS = {
    "epd_ec_scheduler_hook_seconds": "Wall-clock time of one call of a hook on the scheduler's thread.",
    "epd_ec_scheduler_hook_cpu_seconds": "CPU time of such a call's thread; the rest is waiting.",
}
BUCKETS_S = (0.001, 0.005, 0.02, 0.1)
GAUGES = {
    "epd_ec_breaker_open": "1 while the store is not used because it is not healthy.",
    "epd_ec_slab_used_bytes": "Bytes of slab_size_mb in use.",
}


class Metrics:
    """Sums by name and label value. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def count(self, name: str, value: float = 1, label: str = "") -> None:
        """Add to a counter of COUNTERS."""
        with self._lock:
            key = f"{name}|{label}"
            self._sums[key] = self._sums.get(key, 0) + value

    def observe(self, name: str, seconds: float) -> None:
        """Add one observation to a summary of SUMMARIES."""
        self.count(name, seconds, "sum")
        self.count(name, 1, "count")

    def distribute(self, name: str, seconds: float) -> None:
        """Add one observation to a histogram of HISTOGRAMS."""
        bucket = next((str(bound) for bound in BUCKETS_S if seconds <= bound), "+Inf")
        self.count(name, 1, bucket)
        self.count(name, seconds, "sum")

    @contextmanager
    def time_hook(self) -> Iterator[None]:
        """Distribute the time the block takes, by the wall clock and by this thread's CPU clock."""
        started_s, started_cpu_s = time.monotonic(), time.thread_time()
        try:
            yield
        finally:
            self.distribute("epd_ec_scheduler_hook_seconds", time.monotonic() - started_s)
            self.distribute("epd_ec_scheduler_hook_cpu_seconds", time.thread_time() - started_cpu_s)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Observe the time the block takes, in seconds."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.observe(name, time.monotonic() - started_s)

    def snapshot(self) -> dict[str, float]:
        """Return all sums so far, by ``name|label``."""
        with self._lock:
            return dict(self._sums)


def add_sums(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return sums by ``name|label`` of several processes together."""
    sums: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            sums[key] = sums.get(key, 0) + value
    return sums


class Collector:
    """Adds up the sums of both processes whenever Prometheus asks."""

    def __init__(
        self, sources: Iterable[Callable[[], Mapping[str, float]]], gauges: Mapping[str, Callable[[], float]]
    ) -> None:
        self._sources = tuple(sources)
        self._gauges = dict(gauges)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, also those that are still 0."""
        sums = add_sums(source() for source in self._sources)
        for name, (text, label) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=[label[0]] if label else [])
            for part in label[1] if label else ("",):
                counter.add_metric([part] if label else [], sums.get(f"{name}|{part}", 0))
            yield counter
        for name, text in SUMMARIES.items():
            number, seconds = sums.get(f"{name}|count", 0), sums.get(f"{name}|sum", 0)
            yield SummaryMetricFamily(name, text, count_value=int(number), sum_value=seconds)
        for name, text in HISTOGRAMS.items():
            total, buckets = 0.0, []
            for bound in (*map(str, BUCKETS_S), "+Inf"):
                total += sums.get(f"{name}|{bound}", 0)
                buckets.append((bound, total))
            yield HistogramMetricFamily(name, text, buckets=buckets, sum_value=sums.get(f"{name}|sum", 0))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(name, text, value=self._gauges[name]())


class MetricsServer:
    """Serves a collector on ``host:port``. Raises ConfigError when the port cannot be had."""

    def __init__(self, collector: Collector, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(collector)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ConfigError([f"metrics_port: cannot listen on {host}:{port} ({error.strerror})"]) from error

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
