"""The connector's counters through vLLM's own hooks (from 0.31): in its log, and at the /metrics of its API server.

They bear the names of :mod:`.metrics`, with vLLM's labels. What is there a summary is two counters here, and the
histograms of hooks are at the connector's own port alone: vLLM hands on sums of a step, not single calls.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .compat import ECConnectorPromMetrics, ECConnectorStats
from .metrics import COUNTERS, SUMMARIES


class SumsOfStep(ECConnectorStats):
    """Sums by ``name|label`` that were added since the last ones were taken; ``data`` travels between processes."""

    def reset(self) -> None:
        """Forget them."""
        self.data = {}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data

    def aggregate(self, other: ECConnectorStats) -> ECConnectorStats:
        """Return both together."""
        keys = self.data.keys() | other.data.keys()
        return SumsOfStep(data={key: self.data.get(key, 0) + other.data.get(key, 0) for key in keys})

    def reduce(self) -> dict[str, int | float]:
        """Return what vLLM's log line of an interval shows: the sums that are not 0, without the prefix."""
        return {
            key.removeprefix("epd_ec_").rstrip("|").replace("|", "_"): round(value, 6)
            for key, value in sorted(self.data.items())
        }


class SumsTaker:
    """Hands out what was counted since it was last asked; ``read`` returns all sums so far, by ``name|label``."""

    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read
        self._taken: Mapping[str, float] = {}

    def take(self) -> SumsOfStep | None:
        """Return the difference, None when there is none."""
        sums = self._read()
        grown = {
            key: value - self._taken.get(key, 0)
            for key, value in sums.items()
            if value != self._taken.get(key) and key.partition("|")[0] in (COUNTERS.keys() | SUMMARIES.keys())
        }
        self._taken = sums
        return SumsOfStep(data=grown) if grown else None


class NativeMetrics(ECConnectorPromMetrics):
    """Counters in the registry of vLLM's API server."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counters: dict[str, Any] = {}
        for name, (text, label) in COUNTERS.items():
            self._add(f"{name}|", name, text, label[0] if label else "")
        for name, text in SUMMARIES.items():
            self._add(f"{name}|sum", name, text, "")
            self._add(f"{name}|count", f"{name.removesuffix('_seconds')}_operations", f"Number of: {text}", "")

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the sums of a step of one engine."""
        engine = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.items():
            name, _, label = key.partition("|")
            counter = self._counters.get(key) or self._counters.get(f"{name}|")
            if counter is not None:
                is_labelled = key not in self._counters
                counter.labels(*engine, *([label] if is_labelled else [])).inc(value)

    def _add(self, key: str, name: str, text: str, label: str) -> None:
        names = [*self._labelnames, *([label] if label else [])]
        self._counters[key] = self._counter_cls(name=name, documentation=text, labelnames=names)
