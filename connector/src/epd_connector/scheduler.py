"""The scheduler's side: decides, from dictionaries alone, which items come from the store.

Per item: unknown → FETCHING → READY | MISSED → HELD. The worker looks the item up, fetches and verifies it while the
state is FETCHING; this side only reads what it answered. Once loaded or encoded, an item is HELD by vLLM's own encoder
cache until vLLM says that it was evicted there: its region is free at once, so that the next item is written
where the processor's caches are warm. All runs on vLLM's scheduler thread, without a lock; nothing of the worker's side
may be imported.
"""

import enum
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .compat import Feature, Lookup
from .config import ConnectorConfig
from .link import MAX_ITEM_ID_CHARS, Confirmed, CountsSender, Fetch, LinkClient, Missing, Ready, Release, Reply
from .metadata import Location, StepMetadata
from .metrics import Metrics
from .stall import StallBudget

log = logging.getLogger(__name__)

MAX_FETCHING = 4096
MAX_MISSES = 65_536
# An item that is awaited is looked for so often.
ARRIVAL_POLL_S = 0.025


class State(enum.Enum):
    """What is known of one item."""

    FETCHING = enum.auto()
    READY = enum.auto()
    MISSED = enum.auto()
    HELD = enum.auto()


@dataclass(slots=True)
class Item:
    """One item; times are those of the scheduler's clock, in seconds."""

    state: State
    rows: int
    changed_at_s: float
    used_at_s: float
    location: Location | None = None
    is_absent: bool = False
    """Whether it is MISSED since the store does not have it."""
    is_awaited: bool = False
    """Whether it is FETCHING for a request whose items are on their way: then absent is not yet a miss."""


@dataclass(slots=True)
class Wait:
    """One request that waits or waited for its items. ``arriving``: they are being encoded while it waits."""

    started_at_s: float
    arriving: bool = False
    was_deferred: bool = False
    is_over: bool = False


class ConsumerScheduler:
    """State machine of an instance that takes embeddings from the store."""

    def __init__(
        self,
        config: ConnectorConfig,
        link: LinkClient,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch_timeout_s = config.fetch_timeout_ms / 1000
        self._arrival_timeout_s = config.arrival_timeout_ms / 1000
        self._ready_ttl_s = config.ready_ttl_s
        self._link = link
        self._metrics = metrics
        self._clock = clock
        self._items: OrderedDict[str, Item] = OrderedDict()  # least recently used first
        self._fetching = 0
        self._waits: dict[str, Wait] = {}
        self._unannounced: dict[str, Wait] = {}  # requests that vLLM never passed to ensure_available
        self._step_hits: set[str] = set()
        self._step_loads: dict[str, Location] = {}
        self._step = 0
        self._counts = CountsSender(link, metrics)
        self._stalls = StallBudget(config.sync_fetch_timeout_ms / 1000, metrics, clock)

    def __repr__(self) -> str:
        states = [item.state for item in self._items.values()]
        counts = ", ".join(f"{states.count(state)} {state.name.lower()}" for state in State)
        return f"<ConsumerScheduler: {counts}, {len(self._waits)} requests, step {self._step}>"

    def ensure_available(self, request_id: str, features: Sequence[Feature], arriving: bool = False) -> bool:
        """Return True when every item is READY or MISSED, or the request has waited long enough.

        ``arriving``: the items are being encoded elsewhere, so one that the store does not have yet is no miss before
        ``arrival_timeout_ms`` are over.
        """
        self._receive()
        now_s = self._clock()
        wait = self._waits.get(request_id)
        if wait is None:
            wait = self._waits[request_id] = Wait(now_s, arriving)
        if wait.is_over:
            return True
        # No short cut at the first pending item: all are asked for at once.
        settled = [self._is_settled(feature, wait, now_s) for feature in features]
        limit_s = self._arrival_timeout_s if wait.arriving else self._fetch_timeout_s
        is_late = now_s - wait.started_at_s >= limit_s
        if not all(settled) and not is_late:
            wait.was_deferred = True
            return False
        if not all(settled) or any(self._is_fetching(feature.item_id) for feature in features):
            self._metrics.count("epd_ec_deadlines")
            wait.is_over = True
            if wait.arriving:
                self._count_absent(features)
        elif wait.was_deferred:
            self._metrics.observe("epd_ec_deferral_seconds", now_s - wait.started_at_s)
            wait.was_deferred = False
        return True

    def has_item(self, item_id: str, lookup: Lookup | None = None) -> bool:
        """Return whether the item is READY; a True is kept for the rest of the step.

        ``lookup`` tells on whose behalf it is asked. A request that ``ensure_available`` never saw is served
        here: its items are asked for, and the scheduler stands still for this one, within the step's budget.
        """
        if lookup is not None and lookup.request_id not in self._waits:
            self._fetch_now(item_id, lookup)
        item = self._items.get(item_id)
        if item is None or item.state is not State.READY:
            if item is not None and item.state is State.HELD:
                self._forget(item_id)  # or vLLM would not ask
            return False
        self._step_hits.add(item_id)
        return True

    def record_allocation(self, item_id: str) -> None:
        """Take note that vLLM made room for an item: load it when ``has_item`` said so, else it is encoded here."""
        item = self._items.get(item_id)
        if item_id in self._step_hits and item is not None and item.location is not None:
            self._step_loads[item_id] = item.location
            self._metrics.count("epd_ec_hits")
        else:
            self._metrics.count("epd_ec_local_encodes")
            if item is not None:
                self._hold(item_id, item)

    def close_step(self, finished_request_ids: Iterable[str], evicted_item_ids: Iterable[str]) -> StepMetadata:
        """Return the loads of the step and begin the next one; ``evicted_item_ids`` are gone from vLLM's cache."""
        for item_id in evicted_item_ids:
            if item_id in self._items and self._items[item_id].state is State.HELD:
                self._forget(item_id)
        loads = tuple(self._step_loads.items())
        if loads:
            self._step += 1
        for item_id, _ in loads:
            self._hold(item_id, self._items[item_id], self._step)
        self._step_loads.clear()
        self._step_hits.clear()
        for request_id in finished_request_ids:
            self._waits.pop(request_id, None)
            self._unannounced.pop(request_id, None)
        self._stalls.end_step()
        self._expire()
        return StepMetadata(step=self._step, loads=loads)

    def send_counts(self) -> None:
        """Let the worker serve this side's counters."""
        self._counts.send()

    def close(self) -> None:
        """Close the link."""
        self._link.close()

    def _fetch_now(self, item_id: str, lookup: Lookup) -> None:
        self._receive()
        now_s = self._clock()
        wait = self._unannounced.setdefault(lookup.request_id, Wait(now_s))
        # The later items of the request too: they are on their way when vLLM comes to them.
        settled = [self._is_settled(feature, wait, now_s) for feature in lookup.features]
        if settled[0]:
            return
        with self._stalls.spend() as find_left_s:
            while self._is_fetching(item_id) and (left_s := find_left_s()) > 0:
                self._link.wait(left_s)
                self._receive()
        if self._is_fetching(item_id):
            self._metrics.count("epd_ec_deadlines")

    def _is_settled(self, feature: Feature, wait: Wait, now_s: float) -> bool:
        item = self._items.get(feature.item_id)
        if item is not None and item.state in (State.READY, State.HELD) and item.rows != feature.rows:
            # A client's uuid used twice. The earlier answer was checked against other rows.
            if feature.item_id in self._step_hits:
                return True
            self._drop(feature.item_id)
            item = None
        if item is None:
            return self._ask(feature, now_s, awaited=wait.arriving)
        self._touch(feature.item_id, now_s)
        if wait.arriving and item.is_absent:
            if now_s - item.changed_at_s >= ARRIVAL_POLL_S:
                self._ask(feature, now_s, awaited=True)
            return False
        if item.state is State.MISSED and item.changed_at_s < wait.started_at_s:
            # It may have been published since: the proxy sends a request here after its items were encoded.
            return self._ask(feature, now_s, awaited=wait.arriving)
        # A fetch that hangs delays the requests of its own time, not every later one.
        limit_s = self._arrival_timeout_s if wait.arriving and item.is_awaited else self._fetch_timeout_s
        return item.state is not State.FETCHING or now_s - item.changed_at_s >= limit_s

    def _count_absent(self, features: Sequence[Feature]) -> None:
        for feature in features:
            item = self._items.get(feature.item_id)
            if item is not None and (item.is_absent or item.is_awaited):
                self._metrics.count("epd_ec_misses", label="absent")

    def _is_fetching(self, item_id: str) -> bool:
        item = self._items.get(item_id)
        return item is not None and item.state is State.FETCHING

    def _ask(self, feature: Feature, now_s: float, *, awaited: bool) -> bool:
        reason = self._find_obstacle(feature)
        if reason:
            self._miss(feature.item_id, feature.rows, reason)
            return True
        self._forget(feature.item_id)
        self._items[feature.item_id] = Item(State.FETCHING, feature.rows, now_s, now_s, is_awaited=awaited)
        self._fetching += 1
        self._link.send(Fetch(feature.item_id, feature.rows))
        return False

    def _find_obstacle(self, feature: Feature) -> str:
        if len(feature.item_id) > MAX_ITEM_ID_CHARS:
            return "unsupported"
        if self._fetching >= MAX_FETCHING or self._link.is_behind:
            return "link_behind"
        return "" if self._link.connect() else "link_down"

    def _receive(self) -> None:
        for reply in self._link.poll():
            self._stalls.hear()
            self._take(reply)
        if not self._link.is_up and self._fetching:
            for item_id in [key for key, item in self._items.items() if item.state is State.FETCHING]:
                self._miss(item_id, self._items[item_id].rows, "link_down")

    def _take(self, reply: Reply) -> None:
        if isinstance(reply, Confirmed):
            return
        item = self._items.get(reply.item_id)
        if item is None or item.state is not State.FETCHING:
            if isinstance(reply, Ready):
                self._link.send(Release(reply.location.offset, 0))
            return
        if isinstance(reply, Ready):
            self._fetching -= 1
            item.state, item.location, item.changed_at_s = State.READY, reply.location, self._clock()
        elif isinstance(reply, Missing):
            self._miss(reply.item_id, item.rows, reply.reason, awaited=item.is_awaited)

    def _miss(self, item_id: str, rows: int, reason: str, *, awaited: bool = False) -> None:
        self._forget(item_id)
        now_s = self._clock()
        self._items[item_id] = Item(State.MISSED, rows, now_s, now_s, is_absent=reason == "absent")
        if not (awaited and reason == "absent"):
            self._metrics.count("epd_ec_misses", label=reason)

    def _hold(self, item_id: str, item: Item, loaded_in_step: int = 0) -> None:
        self._drop(item_id, loaded_in_step)  # its place is used again when all ranks have finished that step
        now_s = self._clock()
        self._items[item_id] = Item(State.HELD, item.rows, now_s, now_s)

    def _drop(self, item_id: str, loaded_in_step: int = 0) -> None:
        item = self._items[item_id]
        if item.location is not None:
            self._link.send(Release(item.location.offset, loaded_in_step))
        self._forget(item_id)

    def _forget(self, item_id: str) -> None:
        item = self._items.pop(item_id, None)
        if item is not None and item.state is State.FETCHING:
            self._fetching -= 1

    def _touch(self, item_id: str, now_s: float) -> None:
        self._items[item_id].used_at_s = now_s
        self._items.move_to_end(item_id)

    def _expire(self) -> None:
        """Forget what nobody asked for lately; a fetch under way is kept, its answer is still to come."""
        now_s = self._clock()
        while self._items:
            item_id, item = next(iter(self._items.items()))
            is_old = now_s - item.used_at_s >= self._ready_ttl_s
            if not is_old and len(self._items) <= MAX_MISSES:
                return
            if item.state is State.FETCHING:
                self._touch(item_id, now_s)  # there are fewer than MAX_MISSES of these, so the loop ends
            else:
                self._drop(item_id)
