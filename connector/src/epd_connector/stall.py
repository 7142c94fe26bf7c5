"""How long the scheduler may stand still for items, where vLLM cannot defer a request."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .metrics import Metrics


class StallBudget:
    """``limit_s`` for all waits of one step together.

    Once it ran out, there is none until the worker answered something: a store that hangs costs one budget, not one
    in every step until the circuit breaker opens.
    """

    def __init__(self, limit_s: float, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._metrics = metrics
        self._clock = clock
        self._spent_s = 0.0
        self._is_silent = False

    @contextmanager
    def spend(self) -> Iterator[Callable[[], float]]:
        """Take the time of the block; the function it gets tells how many seconds are left, 0 for none."""
        started_s = self._clock()

        def find_left_s() -> float:
            left_s = self._limit_s - self._spent_s - (self._clock() - started_s)
            return 0.0 if self._is_silent else max(left_s, 0.0)

        try:
            yield find_left_s
        finally:
            is_used_up = find_left_s() <= 0
            took_s = self._clock() - started_s
            self._spent_s += took_s
            self._is_silent = is_used_up
            self._metrics.observe("epd_ec_stall_seconds", took_s)

    def hear(self) -> None:
        """Take note that the worker answered."""
        self._is_silent = False

    def end_step(self) -> None:
        """Begin the next step."""
        self._spent_s = 0.0
