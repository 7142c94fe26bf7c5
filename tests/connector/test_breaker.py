import pytest

from epd_connector.breaker import COOL_DOWN_S, FAILURES_TO_OPEN, MAX_COOL_DOWN_S, Breaker
from epd_connector.store.base import StoreError, StoreFullError, StoreUnavailableError


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    breaker = Breaker(slow_s=1.0, clock=clock)
    breaker.record_probe(None)
    return breaker


def fail(breaker: Breaker, error: type[StoreError]) -> None:
    with pytest.raises(error), breaker.operation():
        raise error


def test_starts_open_until_a_probe_succeeds(clock: Clock) -> None:
    breaker = Breaker(slow_s=1.0, clock=clock)
    assert breaker.is_open
    breaker.record_probe(None)
    assert not breaker.is_open


def test_opens_at_once_when_the_store_is_unavailable(breaker: Breaker) -> None:
    fail(breaker, StoreUnavailableError)
    assert breaker.is_open


def test_opens_after_failures_in_a_row_only(breaker: Breaker) -> None:
    for _ in range(FAILURES_TO_OPEN - 1):
        fail(breaker, StoreError)
    with breaker.operation():
        pass
    for _ in range(FAILURES_TO_OPEN - 1):
        fail(breaker, StoreError)
    assert not breaker.is_open
    fail(breaker, StoreError)
    assert breaker.is_open


def test_a_full_store_is_a_healthy_one(breaker: Breaker) -> None:
    for _ in range(10 * FAILURES_TO_OPEN):
        fail(breaker, StoreFullError)
    assert not breaker.is_open


def test_opens_while_a_call_hangs_and_stays_open_until_it_ended(breaker: Breaker, clock: Clock) -> None:
    with breaker.operation():
        clock.now_s += 0.9
        assert not breaker.is_open
        clock.now_s += 0.2
        assert breaker.is_open
        clock.now_s += 60
        breaker.record_probe(None)
        assert breaker.is_open
    breaker.record_probe(None)
    assert not breaker.is_open


def test_a_probe_closes_it_only_after_the_cool_down(breaker: Breaker, clock: Clock) -> None:
    fail(breaker, StoreUnavailableError)
    breaker.record_probe(None)
    assert breaker.is_open
    clock.now_s += COOL_DOWN_S
    breaker.record_probe(None)
    assert not breaker.is_open


def test_cool_down_doubles_up_to_its_limit_and_a_success_resets_it(breaker: Breaker, clock: Clock) -> None:
    waited_s = []
    for _ in range(6):
        fail(breaker, StoreUnavailableError)
        start_s = clock.now_s
        while breaker.is_open:
            clock.now_s += 0.5
            breaker.record_probe(None)
        waited_s.append(clock.now_s - start_s)
    assert waited_s == [1, 2, 4, 8, MAX_COOL_DOWN_S, MAX_COOL_DOWN_S]
    with breaker.operation():
        pass
    fail(breaker, StoreUnavailableError)
    clock.now_s += COOL_DOWN_S
    breaker.record_probe(None)
    assert not breaker.is_open


def test_a_probe_that_finds_no_store_opens_it_before_a_request_pays(breaker: Breaker) -> None:
    breaker.record_probe(StoreUnavailableError())
    assert breaker.is_open


def test_one_slow_probe_opens_nothing_but_several_in_a_row_do(breaker: Breaker) -> None:
    for _ in range(5):
        breaker.record_probe(StoreError())
        breaker.record_probe(None)
    assert not breaker.is_open
    for _ in range(FAILURES_TO_OPEN):
        assert not breaker.is_open
        breaker.record_probe(StoreError())
    assert breaker.is_open


def test_probes_do_not_hide_failing_operations(breaker: Breaker) -> None:
    for _ in range(FAILURES_TO_OPEN):
        fail(breaker, StoreError)
        breaker.record_probe(None)
    assert breaker.is_open
