"""The consumer's state machine against a worker faked at the wire: a socket that answers what a test tells it to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_worker import CONFIG, Clock, FakeWorker, feature, ready

from epd_connector.link import MAX_ITEM_ID_CHARS, Counts, Fetch, LinkClient, Missing, Release, Reply
from epd_connector.metrics import Metrics
from epd_connector.scheduler import ConsumerScheduler


@pytest.fixture
def scheduler(tmp_path: Path, clock: Clock, metrics: Metrics, worker: FakeWorker) -> Iterator[ConsumerScheduler]:
    scheduler = ConsumerScheduler(CONFIG, LinkClient(tmp_path), metrics, clock)
    yield scheduler
    scheduler.close()


def make_ready(scheduler: ConsumerScheduler, worker: FakeWorker, item_id: str, offset: int = 256) -> None:
    assert not scheduler.ensure_available(f"request-{item_id}", [feature(item_id)])
    worker.receive()
    worker.send(ready(item_id, offset))
    assert scheduler.ensure_available(f"request-{item_id}", [feature(item_id)])


def load(scheduler: ConsumerScheduler, item_id: str) -> None:
    assert scheduler.has_item(item_id)
    scheduler.record_allocation(item_id)
    assert [loaded for loaded, _ in scheduler.close_step([], []).loads] == [item_id]


def test_item_is_fetched_once_then_loaded(
    scheduler: ConsumerScheduler, worker: FakeWorker, metrics: Metrics, clock: Clock
) -> None:
    for _ in range(5):
        assert not scheduler.ensure_available("r", [feature("a"), feature("b", 9)])
    assert worker.receive() == [Fetch("a", 4), Fetch("b", 9)]
    assert not scheduler.has_item("a")
    worker.send(ready("a"))
    assert not scheduler.ensure_available("r", [feature("a"), feature("b", 9)])
    worker.send(Missing("b", "absent"))
    clock.now_s += 0.25
    assert scheduler.ensure_available("r", [feature("a"), feature("b", 9)])
    assert scheduler.has_item("a")
    assert not scheduler.has_item("b")
    scheduler.record_allocation("a")
    scheduler.record_allocation("b")
    metadata = scheduler.close_step([], [])
    assert metadata.loads == (("a", ready("a").location),)
    assert metadata.step == 1
    sums = metrics.snapshot()
    assert sums["epd_ec_hits|"] == 1
    assert sums["epd_ec_local_encodes|"] == 1
    assert sums["epd_ec_misses|absent"] == 1
    assert sums["epd_ec_deferral_seconds|sum"] == pytest.approx(0.25)


def test_only_items_that_were_promised_in_the_step_are_loaded(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    assert not scheduler.ensure_available("r", [feature("a")])
    assert not scheduler.has_item("a")
    worker.receive()
    worker.send(ready("a"))
    scheduler.ensure_available("other", [feature("a")])
    # vLLM was told "no" and encodes it, although it is there by now.
    scheduler.record_allocation("a")
    assert scheduler.close_step([], []).loads == ()


def test_promise_holds_to_the_end_of_the_step(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    make_ready(scheduler, worker, "a")
    assert scheduler.has_item("a")
    # The same uuid with other rows may not take it back now.
    scheduler.ensure_available("r2", [feature("a", rows=5), feature("b")])
    assert worker.receive() == [Fetch("b", 4)]
    assert scheduler.has_item("a")
    scheduler.record_allocation("a")
    assert [item_id for item_id, _ in scheduler.close_step([], []).loads] == ["a"]


def test_request_stops_waiting_at_its_deadline(
    scheduler: ConsumerScheduler, clock: Clock, metrics: Metrics, worker: FakeWorker
) -> None:
    assert not scheduler.ensure_available("r", [feature("a")])
    clock.now_s += 0.499
    assert not scheduler.ensure_available("r", [feature("a")])
    clock.now_s += 0.001
    assert scheduler.ensure_available("r", [feature("a")])
    assert not scheduler.has_item("a")
    assert metrics.snapshot()["epd_ec_deadlines|"] == 1
    # A fetch that hangs delays nobody else either.
    assert scheduler.ensure_available("later", [feature("a")])


def test_earlier_miss_is_asked_again_for_a_later_request(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock
) -> None:
    scheduler.ensure_available("r", [feature("a")])
    worker.receive()
    worker.send(Missing("a", "absent"))
    assert scheduler.ensure_available("r", [feature("a")])
    assert scheduler.ensure_available("r", [feature("a")])
    clock.now_s += 0.01
    assert not scheduler.ensure_available("later", [feature("a")])
    assert worker.receive() == [Fetch("a", 4)]


def poll(scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock, answer: Reply) -> bool:
    """Let the request ask once more, and the worker answer."""
    clock.now_s += 0.03
    assert not scheduler.ensure_available("r", [feature("a")], True)
    assert worker.receive() == [Fetch("a", 4)]
    worker.send(answer)
    return scheduler.ensure_available("r", [feature("a")], True)


def test_items_on_their_way_are_waited_for(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock, metrics: Metrics
) -> None:
    for _ in range(60):  # longer than fetch_timeout_ms
        assert not poll(scheduler, worker, clock, Missing("a", "absent"))
        assert not scheduler.ensure_available("r", [feature("a")], True)
        assert worker.receive() == []  # not before a while
    assert poll(scheduler, worker, clock, ready("a"))
    load(scheduler, "a")
    counts = metrics.snapshot()
    assert counts.get("epd_ec_misses|absent", 0) == counts.get("epd_ec_deadlines|", 0) == 0


def test_the_wait_for_items_on_their_way_has_an_end(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock, metrics: Metrics
) -> None:
    for _ in range(160):
        assert not poll(scheduler, worker, clock, Missing("a", "absent"))
    clock.now_s += 0.5
    assert scheduler.ensure_available("r", [feature("a")], True)
    assert not scheduler.has_item("a")
    worker.receive()
    for _ in range(3):
        clock.now_s += 1
        assert scheduler.ensure_available("r", [feature("a")], True)
    assert worker.receive() == []
    counts = metrics.snapshot()
    assert counts["epd_ec_misses|absent"] == counts["epd_ec_deadlines|"] == 1


def test_one_late_answer_does_not_end_the_wait_for_items_on_their_way(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock, metrics: Metrics
) -> None:
    assert not scheduler.ensure_available("r", [feature("a")], True)
    worker.receive()
    clock.now_s += 2  # longer than fetch_timeout_ms
    assert not scheduler.ensure_available("r", [feature("a")], True)
    worker.send(ready("a"))
    assert scheduler.ensure_available("r", [feature("a")], True)
    load(scheduler, "a")
    assert metrics.snapshot().get("epd_ec_deadlines|", 0) == 0


@pytest.mark.parametrize("reason", ["store_down", "corrupt", "wrong_rows", "too_large"])
def test_only_an_absent_item_may_still_come(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock, reason: str
) -> None:
    assert poll(scheduler, worker, clock, Missing("a", reason))


def test_who_does_not_wait_is_not_held_up_by_who_does(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock
) -> None:
    assert not poll(scheduler, worker, clock, Missing("a", "absent"))
    clock.now_s += 0.01
    assert not scheduler.ensure_available("other", [feature("a")])
    assert worker.receive() == [Fetch("a", 4)]
    worker.send(Missing("a", "absent"))
    assert scheduler.ensure_available("other", [feature("a")])
    assert not scheduler.ensure_available("r", [feature("a")], True)


def test_what_was_loaded_gives_its_place_back_and_is_vllms_own_until_evicted(
    scheduler: ConsumerScheduler, worker: FakeWorker
) -> None:
    make_ready(scheduler, worker, "a")
    load(scheduler, "a")
    assert worker.receive() == [Release(256, after_step=1)]
    assert scheduler.ensure_available("later", [feature("a")])
    assert scheduler.close_step([], ["another"]).loads == ()
    assert scheduler.ensure_available("later still", [feature("a")])
    assert worker.receive() == []
    scheduler.close_step([], ["a"])
    assert not scheduler.ensure_available("after that", [feature("a")])
    assert worker.receive() == [Fetch("a", 4)]


def test_what_was_encoded_here_is_not_asked_for_until_evicted(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock
) -> None:
    make_ready(scheduler, worker, "came too late", offset=4096)
    scheduler.ensure_available("r", [feature("a")])
    worker.receive()
    worker.send(Missing("a", "absent"))
    assert scheduler.ensure_available("r", [feature("a")])
    for item_id in ("a", "came too late"):
        scheduler.record_allocation(item_id)
    assert scheduler.close_step([], []).loads == ()
    assert worker.receive() == [Release(4096, after_step=0)]
    clock.now_s += 1
    assert scheduler.ensure_available("later", [feature("a"), feature("came too late")])
    assert worker.receive() == []
    scheduler.close_step([], ["a"])
    assert not scheduler.ensure_available("after that", [feature("a"), feature("came too late")])
    assert worker.receive() == [Fetch("a", 4)]


def test_question_for_what_vllm_should_have_is_a_miss_once(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    """vLLM's cache was emptied without a word."""
    make_ready(scheduler, worker, "a")
    load(scheduler, "a")
    worker.receive()
    assert not scheduler.has_item("a")
    assert not scheduler.ensure_available("later", [feature("a")])
    assert worker.receive() == [Fetch("a", 4)]


def test_item_that_is_evicted_and_loaded_in_one_step_is_held(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    make_ready(scheduler, worker, "a")
    load(scheduler, "a")
    scheduler.close_step([], ["a"])
    make_ready(scheduler, worker, "a")
    scheduler.has_item("a")
    scheduler.record_allocation("a")
    assert len(scheduler.close_step([], ["a"]).loads) == 1
    assert scheduler.ensure_available("later", [feature("a")])


def test_full_slab_is_a_miss(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    make_ready(scheduler, worker, "waiting", offset=8192)
    assert not scheduler.ensure_available("r", [feature("new")])
    worker.receive()
    worker.send(Missing("new", "slab_full"))
    assert scheduler.ensure_available("r", [feature("new")])
    assert not scheduler.has_item("new")
    assert scheduler.has_item("waiting")


def test_rows_of_a_reused_uuid_are_checked_again(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    make_ready(scheduler, worker, "a")
    assert not scheduler.ensure_available("r", [feature("a", rows=5)])
    assert worker.receive() == [Release(256, 0), Fetch("a", 5)]
    assert not scheduler.has_item("a")


def test_unused_items_are_given_back_and_nothing_grows(
    scheduler: ConsumerScheduler, worker: FakeWorker, clock: Clock
) -> None:
    make_ready(scheduler, worker, "a")
    clock.now_s += 61
    scheduler.close_step(["request-a"], [])
    assert worker.receive() == [Release(256, 0)]
    assert repr(scheduler) == "<ConsumerScheduler: 0 fetching, 0 ready, 0 missed, 0 held, 0 requests, step 0>"


def test_answer_that_nobody_waits_for_is_released(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    make_ready(scheduler, worker, "a")
    worker.send(ready("a", offset=4352))
    scheduler.ensure_available("r", [])
    assert worker.receive() == [Release(4352, 0)]


def test_without_a_worker_everything_is_a_miss_at_once(tmp_path: Path, metrics: Metrics) -> None:
    scheduler = ConsumerScheduler(CONFIG, LinkClient(tmp_path / "nothing"), metrics)
    assert scheduler.ensure_available("r", [feature("a")])
    assert not scheduler.has_item("a")
    assert metrics.snapshot()["epd_ec_misses|link_down"] == 1


def test_worker_that_dies_leaves_no_request_waiting(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    assert not scheduler.ensure_available("r", [feature("a")])
    worker.receive()
    worker.close()
    assert scheduler.ensure_available("r", [feature("a")])
    assert scheduler.ensure_available("r2", [feature("b")])
    assert "0 fetching" in repr(scheduler)


def test_worker_that_does_not_read_never_blocks_the_scheduler(scheduler: ConsumerScheduler) -> None:
    for number in range(3000):
        scheduler.ensure_available(f"r{number}", [feature(f"{number}" * 500)])
    assert scheduler.ensure_available("last", [feature("z")])  # a blocked send would never return


def test_overlong_uuid_is_not_sent(scheduler: ConsumerScheduler) -> None:
    assert scheduler.ensure_available("r", [feature("u" * (MAX_ITEM_ID_CHARS + 1))])


def test_counters_reach_the_worker_once_per_change(scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
    scheduler.record_allocation("a")
    scheduler.send_counts()
    scheduler.send_counts()
    assert worker.receive() == [Counts({"epd_ec_local_encodes|": 1})]
