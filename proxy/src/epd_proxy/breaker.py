"""A circuit breaker: who fails again and again is left alone for a while, then tried with one request at a time."""

import time
from collections.abc import Callable
from enum import IntEnum

# Each time a trial fails the pause doubles, up to this many times the first one.
_PAUSES_MAX = 16


class State(IntEnum):
    """CLOSED lets all requests pass, HALF_OPEN one at a time, OPEN none. The numbers are those of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Opens after ``failures`` in a row (0: never), for ``open_s`` seconds."""

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.opened_total = 0
        self._failures_max = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._pauses = 0  # how many times open_s the next pause is; 0 while closed
        self._until_s = 0.0
        self._trying = False

    def __repr__(self) -> str:
        return f"<Breaker {self.state.name.lower()} failures={self._failures}>"

    @property
    def state(self) -> State:
        """What it lets pass."""
        if not self._pauses:
            return State.CLOSED
        return State.OPEN if self._clock() < self._until_s else State.HALF_OPEN

    @property
    def admits(self) -> bool:
        """Whether a request may pass now."""
        return not self._pauses or (self.state is State.HALF_OPEN and not self._trying)

    def begin(self) -> bool:
        """A request passes. Returns whether it is the trial, which whoever sent it has to :meth:`end`."""
        if not self._pauses or self._trying:
            return False
        self._trying = True
        return True

    def end(self) -> None:
        """The trial is over, whether or not it told anything."""
        self._trying = False

    def note_success(self) -> None:
        """A request was answered as it should be."""
        self._failures = self._pauses = 0

    def note_failure(self) -> bool:
        """A request failed by the instance's fault. Returns whether that opened the breaker."""
        self._failures += 1
        if not self._failures_max or self._failures < self._failures_max or self.state is State.OPEN:
            return False
        self._pauses = min(2 * self._pauses or 1, _PAUSES_MAX)
        self._until_s = self._clock() + self._pauses * self._open_s
        self.opened_total += 1
        return True
