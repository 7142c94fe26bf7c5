"""The circuit breaker: as a machine of states, and at the wire."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd_proxy.breaker import Breaker, State
from epd_proxy.config import Retry
from epd_proxy.staging import Balance
from fakes import instances as fake
from fakes.proxy_stack import ProxyStack, chat


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, failures: int = 3) -> Breaker:
    breaker = Breaker(failures, 5, clock)
    assert [breaker.note_failure() for _ in range(failures)] == [False] * (failures - 1) + [True]
    return breaker


def test_only_failures_in_a_row_open_it() -> None:
    breaker = Breaker(3, 5)
    for _ in range(5):
        breaker.note_failure()
        breaker.note_failure()
        assert breaker.admits
        breaker.note_success()
    assert (breaker.state, breaker.opened_total) == (State.CLOSED, 0)


def test_it_is_open_then_half_open_then_closed() -> None:
    clock = Clock()
    breaker = opened(clock)
    assert (breaker.state, breaker.admits) == (State.OPEN, False)
    clock.now += 5
    assert (breaker.state, breaker.admits) == (State.HALF_OPEN, True)
    assert breaker.begin()
    assert not breaker.admits  # one at a time
    assert not breaker.begin()
    breaker.end()  # the client left: nothing was learnt
    assert breaker.admits
    assert breaker.begin()
    breaker.note_success()
    breaker.end()
    assert (breaker.state, breaker.admits, breaker.begin()) == (State.CLOSED, True, False)


def test_each_failed_trial_doubles_the_pause_up_to_a_limit() -> None:
    clock = Clock()
    breaker = opened(clock)
    pauses = []
    for _ in range(7):
        start = clock.now
        while not breaker.admits:
            clock.now += 1
        pauses.append(clock.now - start)
        assert breaker.note_failure()
    assert pauses == [5, 10, 20, 40, 80, 80, 80]
    breaker.note_success()
    assert [breaker.note_failure() for _ in range(3)] == [False, False, True]
    clock.now += 5
    assert breaker.admits


def test_failures_of_requests_sent_before_it_opened_change_nothing() -> None:
    clock = Clock()
    breaker = opened(clock)
    for _ in range(10):
        assert not breaker.note_failure()
    clock.now += 5
    assert breaker.admits


def test_it_can_be_switched_off() -> None:
    breaker = Breaker(0, 5)
    for _ in range(100):
        assert not breaker.note_failure()
    assert breaker.admits


@given(st.lists(st.sampled_from(["fail", "succeed", "begin", "end", "tick"]), max_size=60))
def test_it_never_stays_shut(steps: list[str]) -> None:
    clock = Clock()
    breaker = Breaker(2, 5, clock)
    trials = 0
    for step in steps:
        if step == "fail":
            breaker.note_failure()
        elif step == "succeed":
            breaker.note_success()
        elif step == "begin" and breaker.admits:
            trials += breaker.begin()
        elif step == "end" and trials:
            breaker.end()
            trials = 0
        elif step == "tick":
            clock.now += 3
        assert trials <= 1
    breaker.end()
    clock.now += 5 * 16
    assert breaker.admits


ONE_TRY = Retry(max_attempts=1)


@pytest.mark.parametrize(
    ("fault", "opens"),
    [(fake.drop, True), (fake.refuse(500), True), (fake.empty, True), (fake.refuse(502), True),
     (fake.refuse(429), False), (fake.refuse(503), False), (fake.refuse(400), False), (fake.refuse(501), False)],
)  # fmt: skip
async def test_an_instance_that_fails_is_spared(fault: fake.Behaviour, opens: bool) -> None:
    """Overload and refusals are no failures."""
    balance = Balance(breaker_failures=2, breaker_open_s=60)
    async with ProxyStack(encoders=0, instances=2, retry=ONE_TRY, balance=balance) as stack:
        stack.instances[0].default = fault
        replies = [(await stack.post(chat())).status for _ in range(12)]
        asked = len({id(r) for r in stack.instances[0].requests})
        metrics = (await stack.get("/metrics")).body.decode()
        state = f'epd_proxy_breaker_state{{endpoint="{stack.instances[0].url}",stage="prefill_decode"}}'
        assert f"{state} {2.0 if opens else 0.0}" in metrics
        assert (sum(status != 200 for status in replies) == 2) == opens
        # A kept connection that breaks is tried once more.
        assert (asked <= 4) == opens
        assert f'epd_proxy_breaker_opened_total{{endpoint="{stack.instances[0].url}"' in metrics


async def test_one_request_tries_it_and_closes_it() -> None:
    balance = Balance(breaker_failures=1, breaker_open_s=0.5)
    async with ProxyStack(encoders=0, instances=2, retry=ONE_TRY, balance=balance) as stack:
        bad, good = stack.instances
        bad.script.append(fake.refuse(500))
        while not bad.requests:
            await stack.post(chat())
        await asyncio.sleep(0.5)
        bad.default = good.default = fake.after(0.4)
        replies = await asyncio.gather(*(stack.post(chat()) for _ in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        assert (len(bad.requests), bad.running_max) == (2, 1)
        await asyncio.gather(*(stack.post(chat()) for _ in range(8)))
        assert len(bad.requests) == 6


async def test_a_trial_whose_client_leaves_is_given_back() -> None:
    balance = Balance(breaker_failures=1, breaker_open_s=0.2)
    async with ProxyStack(encoders=0, instances=1, retry=ONE_TRY, balance=balance) as stack:
        [instance] = stack.instances
        instance.script.extend([fake.refuse(500), fake.hang])
        await stack.post(chat())
        await asyncio.sleep(0.2)
        leaving = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: instance.running == 1)
        breaker = stack.pools["prefill_decode"].endpoints[0].breaker
        assert not breaker.admits
        leaving.cancel()
        await stack.until(lambda: breaker.admits)
        assert (await stack.post(chat())).status == 200
        assert breaker.state is State.CLOSED


async def test_where_there_is_no_other_it_is_asked_all_the_same() -> None:
    """One client whose requests make an instance fail must not shut out the others."""
    balance = Balance(breaker_failures=1, breaker_open_s=60)
    async with ProxyStack(encoders=0, instances=2, retry=ONE_TRY, balance=balance) as stack:
        for instance in stack.instances:
            instance.script.extend([fake.refuse(500)])
        assert [(await stack.post(chat())).status for _ in range(6)] == [500, 500, 200, 200, 200, 200]
