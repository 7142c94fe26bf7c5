"""Circuit breaker between the connector and its store."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .store.base import StoreError, StoreFullError, StoreUnavailableError

FAILURES_TO_OPEN = 3
COOL_DOWN_S = 1.0
MAX_COOL_DOWN_S = 10.0


class Breaker:
    """Open means: do not use the store. It starts open, and only a successful probe closes it.

    It opens when the store cannot be reached, when three operations or three probes in a row fail, or when an
    operation lasts longer than ``slow_s``: a call that hangs counts while it still hangs. One call that timed out
    opens nothing: on a loaded machine that happens to a healthy store. After each opening without a success in
    between, it stays open twice as long. Thread-safe; ``clock`` is monotonic, in seconds.
    """

    def __init__(self, slow_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._slow_s = slow_s
        self._clock = clock
        self._lock = threading.Lock()
        self._open = True
        self._closable_at_s = 0.0
        self._cool_down_s = COOL_DOWN_S
        self._failures = 0
        self._failed_probes = 0  # apart from operations: a pool whose memory died still answers probes
        self._running: dict[object, float] = {}

    @property
    def is_open(self) -> bool:
        """Whether the store must not be used now."""
        with self._lock:
            self._trip_when_overdue()
            return self._open

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Watch one store operation: its duration and its StoreError, which passes through."""
        token = object()
        with self._lock:
            self._running[token] = self._clock()
        try:
            yield
        except StoreFullError:
            raise  # the store is well, there is only no room
        except StoreError as error:
            self._record_failure(isinstance(error, StoreUnavailableError))
            raise
        else:
            with self._lock:
                # A late success is no proof of health: the probe decides.
                self._trip_when_overdue()
                if not self._open:
                    self._failures = 0
                    self._cool_down_s = COOL_DOWN_S
        finally:
            with self._lock:
                del self._running[token]

    def record_probe(self, error: StoreError | None) -> None:
        """Take the result of a probe: it may close the breaker, or open it before a request has to find out."""
        with self._lock:
            self._trip_when_overdue()
            self._failed_probes = 0 if error is None else self._failed_probes + 1
            if isinstance(error, StoreUnavailableError) or self._failed_probes >= FAILURES_TO_OPEN:
                self._trip()
            elif error is None and self._open and not self._overdue() and self._clock() >= self._closable_at_s:
                self._open = False
                self._failures = 0

    def _record_failure(self, unavailable: bool) -> None:
        with self._lock:
            self._failures += 1
            if unavailable or self._failures >= FAILURES_TO_OPEN:
                self._trip()

    def _overdue(self) -> bool:
        return bool(self._running) and self._clock() - min(self._running.values()) > self._slow_s

    def _trip_when_overdue(self) -> None:
        if not self._open and self._overdue():
            self._trip()

    def _trip(self) -> None:
        if self._open:
            return
        self._open = True
        self._closable_at_s = self._clock() + self._cool_down_s
        self._cool_down_s = min(2 * self._cool_down_s, MAX_COOL_DOWN_S)
