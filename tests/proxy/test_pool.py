"""The pool and its policy: exact choices, leases that balance, health marks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd_proxy.errors import UnavailableError
from epd_proxy.pool import DISCONNECTS_UNTIL_DOWN, Health, Lease, Pool
from epd_proxy.staging import Balance


def pool(size: int) -> Pool:
    return Pool("decode", [f"http://d{i}:1" for i in range(size)])


@given(st.integers(1, 16), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000), st.integers(0, 99))))
def test_defect_09_the_least_loaded_usable_endpoint_is_leased(size: int, steps: list[tuple[int, int, int]]) -> None:
    """Against an oracle that keeps books of its own (known defect 9: a broken heap)."""
    tested = pool(size)
    held: list[tuple[Lease, int, int]] = []
    for kind, cost, pick in steps:
        if kind == 0 and held:
            held.pop(pick % len(held))[0].release()
        elif kind == 1:
            endpoint = tested.endpoints[pick % size]
            endpoint.mark_unreachable("gone") if endpoint.usable else endpoint.mark_probe(None)
        else:
            load = [sum(c for _, at, c in held if at == i) for i in range(size)]
            usable = [i for i, e in enumerate(tested.endpoints) if e.usable]
            if not usable:
                with pytest.raises(UnavailableError):
                    tested.lease(cost)
                continue
            lease = tested.lease(cost)
            at = tested.endpoints.index(lease.endpoint)
            assert at in usable
            assert load[at] == min(load[i] for i in usable)
            held.append((lease, at, cost))
    for lease, _, _ in held:
        lease.release()
        lease.release()
    assert [(e.active_cost, e.active_leases) for e in tested.endpoints] == [(0, 0)] * size


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_open_breakers_are_avoided_and_drained_or_tried_ones_never_taken(
    state: list[tuple[int, bool, bool, bool]],
) -> None:
    tested = Pool("decode", [f"http://d{i}:1" for i in range(len(state))], None, Balance(breaker_failures=1))
    tried = []
    for endpoint, (cost, fails, drains, was_tried) in zip(tested.endpoints, state, strict=True):
        endpoint.load.add(0, cost)
        endpoint.draining = drains
        tried += [endpoint] * was_tried
        if fails:
            endpoint.breaker.note_failure()
    allowed = [(fails, cost) for cost, fails, drains, was_tried in state if not drains and not was_tried]
    if not allowed:
        with pytest.raises(UnavailableError):
            tested.lease(1, tried)
        return
    chosen = tested.lease(0, tried).endpoint
    assert (not chosen.breaker.admits, chosen.active_cost) == min(allowed)


def test_equals_take_turns_one_at_a_time() -> None:
    tested = pool(3)
    chosen = []
    for _ in range(6):
        lease = tested.lease(0)
        chosen.append(lease.endpoint.url)
        lease.release()
    assert sorted(chosen) == sorted(e.url for e in tested.endpoints * 2)


def test_what_was_tried_is_left_out() -> None:
    tested = pool(2)
    first = tested.lease(1).endpoint
    second = tested.lease(1, [first]).endpoint
    assert first is not second
    assert not tested.has_untried([first, second])
    with pytest.raises(UnavailableError, match="decode"):
        tested.lease(1, [first, second])


def test_marks() -> None:
    endpoint = pool(1).endpoints[0]
    assert (endpoint.health, endpoint.usable) == (Health.UNKNOWN, True)
    assert endpoint.mark_probe(None)
    assert not endpoint.mark_probe(None)
    assert not endpoint.mark_probe("slow")  # one missed probe is not an outage
    assert endpoint.usable
    assert endpoint.mark_probe("slow")
    assert (endpoint.health, endpoint.last_error) == (Health.DOWN, "slow")
    assert endpoint.mark_probe(None)
    for _ in range(DISCONNECTS_UNTIL_DOWN - 1):
        endpoint.mark_disconnected("broke")
    endpoint.mark_answered()
    endpoint.mark_disconnected("broke")
    assert endpoint.usable
    for _ in range(DISCONNECTS_UNTIL_DOWN):
        endpoint.mark_disconnected("broke")
    assert not endpoint.usable
    assert "down" in repr(endpoint)


def test_an_instance_that_was_never_up_is_down_after_one_probe() -> None:
    tested = pool(1)
    assert not tested.ready
    assert tested.endpoints[0].mark_probe("refused")
    assert (tested.endpoints[0].usable, tested.reason()) == (False, "0 of 1 up")
