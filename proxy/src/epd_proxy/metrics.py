"""Prometheus metrics. A registry of our own, so that two proxies in one process do not meet."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5, 10, 30)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Count:
    """A counter. What is counted goes to prometheus_client's, with its locks and checks, when somebody looks."""

    __slots__ = ("_child", "_value")

    def __init__(self, child: Counter) -> None:
        self._child = child
        self._value = 0

    def inc(self) -> None:
        """Count one."""
        self._value += 1

    def flush(self) -> None:
        """Hand over what was counted."""
        if self._value:
            self._child.inc(self._value)
            self._value = 0


class Spread:
    """A histogram, filled as :class:`Count` is."""

    __slots__ = ("_bounds", "_child", "_counts", "_sum")

    def __init__(self, child: Histogram) -> None:
        self._child = child
        self._bounds = child._upper_bounds
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def flush(self) -> None:
        """Hand over what was counted: prometheus_client has no call for several values at once."""
        if any(self._counts):
            for bucket, count in zip(self._child._buckets, self._counts, strict=True):
                if count:
                    bucket.inc(count)
            self._child._sum.inc(self._sum)
            self._counts = [0] * len(self._bounds)
            self._sum = 0.0


_Front = TypeVar("_Front", Count, Spread)


class Labelled(dict[tuple[str, ...], _Front]):
    """A metric with labels: one front for each set of their values, made when it is first asked for."""

    def __init__(self, make: Callable[[tuple[str, ...]], _Front]) -> None:
        super().__init__()
        self._make: Callable[[tuple[str, ...]], _Front] = make

    def __missing__(self, values: tuple[str, ...]) -> _Front:
        front = self[values] = self._make(values)
        return front


@dataclass(frozen=True, slots=True)
class EndpointSample:
    """What one endpoint looks like at scrape time."""

    stage: str
    endpoint: str
    up: bool
    leases: int
    cost: int
    breaker: int
    opened_total: int


class Metrics:
    """Everything the proxy counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._fronts: list[Count | Spread] = []
        self.requests = self._counts("epd_proxy_requests", "Requests answered", "path", "status")
        self.request_seconds = self._spreads("epd_proxy_request_seconds", "Whole request, to the last byte", "path")
        self.first_byte_seconds = self._spreads(
            "epd_proxy_first_byte_seconds", "From arrival to the first byte of the answer", "path"
        )
        self.first_token_seconds = self._spreads(
            "epd_proxy_time_to_first_token_seconds", "Streams: from arrival to the first event", "path"
        )
        self.token_seconds = self._spreads(
            "epd_proxy_time_per_output_token_seconds",
            "Streams: time between two events, the mean of each stream", "path", buckets=_TOKEN_SECONDS,
        )  # fmt: skip
        self.token_seconds_max = self._spreads(
            "epd_proxy_inter_token_max_seconds",
            "Streams: time between two events, the longest of each stream", "path", buckets=_TOKEN_SECONDS,
        )  # fmt: skip
        self.stage_seconds = self._spreads(
            "epd_proxy_stage_seconds", "From sending a request to an instance to the first byte of its answer, all of "
            "it where it is no stream", "stage",
        )  # fmt: skip
        self.retries = self._counts(
            "epd_proxy_retries", "Requests sent to a further instance of a stage, as one before it failed", "stage"
        )
        self.encode_seconds = self._spread("epd_proxy_encode_seconds", "All items of one request at the encode stage")
        self.callback_seconds = self._spread(
            "epd_proxy_callback_seconds", "From sending a request to decode until decode calls back"
        )
        self.prefill_seconds = self._spread("epd_proxy_prefill_seconds", "A prefill whose KV goes to decode")
        self.releases = self._counts(
            "epd_proxy_releases",
            "Abandoned requests whose KV blocks decode was to free, by outcome: released, not_needed (no callback "
            "came), refused (by prefill) or expired",
            "outcome",
        )  # fmt: skip
        self.items = self._counts(
            "epd_proxy_encode_items",
            "Media items by outcome: encoded, joined (another request had it encoded meanwhile), known (encoded a "
            "short while ago), local (left to the prefill/decode instance) or refused",
            "modality", "outcome",
        )  # fmt: skip
        self.attempts = self._counts(
            "epd_proxy_stage_attempts", "Requests sent to a stage, by outcome", "stage", "outcome"
        )
        self.refusals = self._counts(
            "epd_proxy_admission_refusals", "Requests refused because of too many others: queue_full or queue_timeout",
            "reason",
        )  # fmt: skip
        self.broken_streams = self._count("epd_proxy_broken_streams", "Streams that failed after their first byte")
        self.reloads = self._counts("epd_proxy_reloads", "Changed files, by outcome: applied or refused", "file",
                                    "outcome")  # fmt: skip
        self.file_in_use = Gauge(
            "epd_proxy_file_in_use", "1 when what the file says is in use, 0 when it was refused", ["file"],
            registry=self.registry, multiprocess_mode="min",
        )  # fmt: skip
        self._shared_folder = os.environ.get(_FOLDER, "")
        self._collectors: list[Collector] = []
        self._watched: list[tuple[Gauge, Callable[[], int]]] = []

    def _count(self, name: str, text: str) -> Count:
        return self._front(Count(Counter(name, text, registry=self.registry)))

    def _counts(self, name: str, text: str, *labels: str) -> Labelled[Count]:
        metric = Counter(name, text, labels, registry=self.registry)
        return Labelled(lambda values: self._front(Count(metric.labels(*values))))

    def _spread(self, name: str, text: str) -> Spread:
        return self._front(Spread(Histogram(name, text, buckets=_SECONDS, registry=self.registry)))

    def _spreads(self, name: str, text: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Labelled[Spread]:
        metric = Histogram(name, text, labels, buckets=buckets, registry=self.registry)
        return Labelled(lambda values: self._front(Spread(metric.labels(*values))))

    def _front(self, front: _Front) -> _Front:
        self._fronts.append(front)
        return front

    def watch_admission(self, running: Callable[[], int], queued: Callable[[], int]) -> None:
        """Report how many requests are served and how many wait, read when a scrape asks for it."""
        self._watch("epd_proxy_requests_running", "Requests that are served now", running)
        self._watch("epd_proxy_requests_queued", "Requests that wait for their turn", queued)

    def watch_endpoints(self, read: Callable[[], Iterable[EndpointSample]]) -> None:
        """Report the endpoints' state, read when a scrape asks for it."""
        self._collectors.append(_EndpointCollector(read))

    def watch_handovers(self, pending_callbacks: Callable[[], int], tasks: Callable[[], int]) -> None:
        """Report what is open between prefill and decode, read when a scrape asks for it."""
        self._watch("epd_proxy_pending_callbacks", "Callback addresses that are open", pending_callbacks)
        self._watch("epd_proxy_handover_tasks", "Prefills and releases under way between prefill and decode", tasks)

    def _watch(self, name: str, text: str, read: Callable[[], int]) -> None:
        gauge = Gauge(name, text, registry=self.registry, multiprocess_mode="sum")
        self._watched.append((gauge, read))

    def refresh(self) -> None:
        """Read what is watched and hand over what was counted. Workers do so from time to time, since any of them
        answers for all; what a killed one has counted since is lost.
        """
        for front in self._fronts:
            front.flush()
        for gauge, read in self._watched:
            gauge.set(read())

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text form (:data:`CONTENT_TYPE`), of all workers together."""
        self.refresh()
        shown = self.registry
        if self._shared_folder:
            shown = CollectorRegistry()
            MultiProcessCollector(shown, self._shared_folder)  # type: ignore[no-untyped-call]
        own = CollectorRegistry()
        for collector in self._collectors:
            own.register(collector)
        return generate_latest(shown) + generate_latest(own)


def share(folder: str, worker: int) -> None:
    """Have what this process counts kept in ``folder``, where the other workers read it, and a successor goes on.

    Before the first :class:`Metrics`. prometheus_client would do so by itself when ``PROMETHEUS_MULTIPROC_DIR`` is set
    before it is imported, but then by process id, and leave a file for each that ever was.
    """
    os.environ[_FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


class _EndpointCollector(Collector):
    def __init__(self, read: Callable[[], Iterable[EndpointSample]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        labels = ["stage", "endpoint"]
        up = GaugeMetricFamily("epd_proxy_endpoint_up", "1 when the endpoint takes requests", labels=labels)
        leases = GaugeMetricFamily("epd_proxy_leases_in_flight", "Requests now at the endpoint", labels=labels)
        cost = GaugeMetricFamily("epd_proxy_active_cost_tokens", "Estimated tokens now at the endpoint", labels=labels)
        breaker = GaugeMetricFamily(
            "epd_proxy_breaker_state",
            "Circuit breaker: 0 closed, 1 half open (one request at a time), 2 open",
            labels=labels,
        )
        opened = CounterMetricFamily("epd_proxy_breaker_opened", "How often the circuit breaker opened", labels=labels)
        for sample in self._read():
            key = [sample.stage, sample.endpoint]
            up.add_metric(key, float(sample.up))
            leases.add_metric(key, sample.leases)
            cost.add_metric(key, sample.cost)
            breaker.add_metric(key, sample.breaker)
            opened.add_metric(key, sample.opened_total)
        return [up, leases, cost, breaker, opened]
