"""The scheduler's side of an instance that only encodes. Like :mod:`.scheduler`: one thread, dictionaries only."""

import time
from collections.abc import Callable, Iterable, Sequence

from .compat import Feature, Lookup
from .config import ConnectorConfig
from .link import MAX_ITEM_ID_CHARS, Confirm, Confirmed, CountsSender, LinkClient
from .metadata import StepMetadata
from .metrics import Metrics


class ProducerScheduler:
    """An instance that only encodes: makes sure that what vLLM's encoder cache holds is in the store too.

    vLLM saves an item when it encodes it, not when its own cache still has it. If the store has lost the item
    meanwhile, the encode request would succeed and the consumer would miss. ``has_item`` is never True here:
    vLLM would then book the item as cached although no worker has it.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        link: LinkClient,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeout_s = config.publish_timeout_ms / 1000
        self._link = link
        self._metrics = metrics
        self._clock = clock
        self._cached: set[str] = set()
        self._waits: dict[str, tuple[float, set[str]]] = {}
        self._counts = CountsSender(link, metrics)

    def ensure_available(
        self,
        request_id: str,
        features: Sequence[Feature],
        arriving: bool = False,  # noqa: ARG002 - as a consumer's
    ) -> bool:
        """Return True when the store has every item that vLLM would not encode again, or after the time limit."""
        self._receive()
        now_s = self._clock()
        if request_id not in self._waits:
            ids = {feature.item_id for feature in features} & self._cached
            self._waits[request_id] = (now_s, {item_id for item_id in ids if self._ask(item_id)})
        started_s, pending = self._waits[request_id]
        if pending and now_s - started_s >= self._timeout_s:
            self._metrics.count("epd_ec_deadlines")
            pending.clear()
        return not pending

    def has_item(self, item_id: str, lookup: Lookup | None = None) -> bool:  # noqa: ARG002 - as a consumer's
        """Return False, always: see the class."""
        return False

    def record_allocation(self, item_id: str) -> None:
        """Take note that the item is encoded now and stays in vLLM's cache."""
        self._cached.add(item_id)

    def close_step(self, finished_request_ids: Iterable[str], evicted_item_ids: Iterable[str]) -> StepMetadata:
        """Take note of what vLLM's cache dropped; return empty metadata, because a producer loads nothing."""
        self._cached.difference_update(evicted_item_ids)
        for request_id in finished_request_ids:
            self._waits.pop(request_id, None)
        return StepMetadata()

    def send_counts(self) -> None:
        """Let the worker serve this side's counters."""
        self._counts.send()

    def close(self) -> None:
        """Close the link."""
        self._link.close()

    def _ask(self, item_id: str) -> bool:
        if len(item_id) > MAX_ITEM_ID_CHARS or self._link.is_behind or not self._link.connect():
            return False
        self._link.send(Confirm(item_id))
        return True

    def _receive(self) -> None:
        confirmed = {reply.item_id for reply in self._link.poll() if isinstance(reply, Confirmed)}
        if not self._link.is_up:
            confirmed.update(*(pending for _, pending in self._waits.values()))
        if confirmed:
            for _, pending in self._waits.values():
                pending.difference_update(confirmed)
