"""The state machine against a worker faked at the wire: a socket that answers what a test tells it to."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from epd_connector.compat import Feature, Lookup
from epd_connector.config import ConnectorConfig
from epd_connector.link import (
    MAX_ITEM_ID_CHARS,
    SOCKET_NAME,
    Confirm,
    Confirmed,
    Counts,
    Fetch,
    LinkClient,
    Missing,
    Ready,
    Release,
    Reply,
    Request,
)
from epd_connector.metadata import Location
from epd_connector.metrics import Metrics
from epd_connector.producer_scheduler import ProducerScheduler
from epd_connector.scheduler import ConsumerScheduler

CONFIG = ConnectorConfig("127.0.0.1:1", fetch_timeout_ms=500, publish_timeout_ms=1000, ready_ttl_s=60)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class FakeWorker:
    def __init__(self, directory: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SOCKET_NAME))
        self._listener.listen(1)
        self._connection: socket.socket | None = None

    def receive(self) -> list[Request]:
        if self._connection is None:
            self._listener.settimeout(1)
            self._connection, _ = self._listener.accept()
            self._connection.setblocking(False)
        requests = []
        try:
            while data := self._connection.recv(1 << 16):
                requests.append(msgspec.msgpack.decode(data, type=Request))
        except BlockingIOError:
            pass
        return requests

    def send(self, *replies: Reply) -> None:
        assert self._connection is not None
        for reply in replies:
            self._connection.send(msgspec.msgpack.encode(reply))

    def close(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    worker = FakeWorker(tmp_path)
    yield worker
    worker.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def scheduler(tmp_path: Path, clock: Clock, metrics: Metrics, worker: FakeWorker) -> Iterator[ConsumerScheduler]:
    scheduler = ConsumerScheduler(CONFIG, LinkClient(tmp_path), metrics, clock)
    yield scheduler
    scheduler.close()


def feature(item_id: str, rows: int = 4) -> Feature:
    return Feature(item_id, rows, end=rows)


def ready(item_id: str, offset: int = 256) -> Ready:
    return Ready(item_id, Location(offset, 64, "float32", (4, 4)))


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


class TestSynchronousFetch:
    """Where vLLM looks items up without having announced the request."""

    LIMIT_S = 0.2

    @pytest.fixture
    def scheduler(self, tmp_path: Path, metrics: Metrics, worker: FakeWorker) -> Iterator[ConsumerScheduler]:
        scheduler = ConsumerScheduler(CONFIG, LinkClient(tmp_path), metrics)
        yield scheduler
        scheduler.close()

    @staticmethod
    def answer(worker: FakeWorker, *replies: Reply, after_s: float = 0.02) -> list[Request]:
        """Reply in the background; return what was asked, filled when the reply is out."""
        asked: list[Request] = []

        def run() -> None:
            while not asked:  # connected is not asked yet
                asked.extend(worker.receive())
            time.sleep(after_s)
            worker.send(*replies)

        threading.Thread(target=run).start()
        return asked

    def test_item_that_arrives_in_time_is_a_hit(
        self, scheduler: ConsumerScheduler, worker: FakeWorker, metrics: Metrics
    ) -> None:
        self.answer(worker, ready("a"))
        assert scheduler.has_item("a", Lookup("r", [feature("a")]))
        scheduler.record_allocation("a")
        assert [item_id for item_id, _ in scheduler.close_step([], []).loads] == ["a"]
        assert 0.01 < metrics.snapshot()["epd_ec_stall_seconds|sum"] < self.LIMIT_S

    def test_all_items_are_asked_for_at_once_and_one_is_waited_for(
        self, scheduler: ConsumerScheduler, worker: FakeWorker
    ) -> None:
        asked = self.answer(worker, Missing("a", "absent"), ready("b"))
        features = [feature("a"), feature("b", 9)]
        assert not scheduler.has_item("a", Lookup("r", features))
        assert asked[:1] == [Fetch("a", 4)]
        assert scheduler.has_item("b", Lookup("r", features[1:]))

    def test_standstill_has_one_limit_per_step(self, scheduler: ConsumerScheduler, metrics: Metrics) -> None:
        started_s = time.monotonic()
        features = [feature(f"item{number}") for number in range(5)]
        assert not any(scheduler.has_item(one.item_id, Lookup("r", [one])) for one in features)
        assert self.LIMIT_S <= time.monotonic() - started_s < 1.5 * self.LIMIT_S
        assert metrics.snapshot()["epd_ec_deadlines|"] == 5

    def test_store_that_hangs_costs_one_limit_and_not_one_per_step(
        self, scheduler: ConsumerScheduler, worker: FakeWorker
    ) -> None:
        started_s = time.monotonic()
        for number in range(50):
            assert not scheduler.has_item(f"item{number}", Lookup(f"r{number}", [feature(f"item{number}")]))
            scheduler.close_step([f"r{number}"], [])
        assert time.monotonic() - started_s < 1.5 * self.LIMIT_S
        worker.receive()
        worker.send(Missing("item0", "absent"))
        self.answer(worker, ready("late"))
        assert scheduler.has_item("late", Lookup("s", [feature("late")]))

    def test_miss_is_asked_again_for_a_later_request_and_not_for_the_same(
        self, scheduler: ConsumerScheduler, worker: FakeWorker
    ) -> None:
        self.answer(worker, Missing("a", "absent"))
        for _ in range(3):
            assert not scheduler.has_item("a", Lookup("r", [feature("a")]))
        assert worker.receive() == []
        self.answer(worker, ready("a"))
        assert scheduler.has_item("a", Lookup("later", [feature("a")]))

    def test_item_with_other_rows_is_no_hit(self, scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
        self.answer(worker, ready("a"))
        assert scheduler.has_item("a", Lookup("r", [feature("a")]))
        scheduler.close_step([], [])
        self.answer(worker, Missing("a", "wrong_rows"))
        assert not scheduler.has_item("a", Lookup("s", [feature("a", rows=5)]))

    def test_announced_request_never_stands_still(self, scheduler: ConsumerScheduler) -> None:
        assert not scheduler.ensure_available("r", [feature("a")])
        started_s = time.monotonic()
        assert not scheduler.has_item("a", Lookup("r", [feature("a")]))
        assert time.monotonic() - started_s < 0.1

    def test_without_a_worker_nothing_is_waited_for(self, tmp_path: Path, metrics: Metrics) -> None:
        scheduler = ConsumerScheduler(CONFIG, LinkClient(tmp_path / "nothing"), metrics)
        started_s = time.monotonic()
        assert not scheduler.has_item("a", Lookup("r", [feature("a")]))
        assert time.monotonic() - started_s < 0.1

    def test_worker_that_dies_ends_the_standstill(self, scheduler: ConsumerScheduler, worker: FakeWorker) -> None:
        def die() -> None:
            worker.receive()
            worker.close()

        threading.Timer(0.02, die).start()
        started_s = time.monotonic()
        assert not scheduler.has_item("a", Lookup("r", [feature("a")]))
        assert time.monotonic() - started_s < self.LIMIT_S


class TestProducer:
    @pytest.fixture
    def producer(self, tmp_path: Path, clock: Clock, metrics: Metrics, worker: FakeWorker) -> ProducerScheduler:
        return ProducerScheduler(CONFIG, LinkClient(tmp_path), metrics, clock)

    def test_new_item_is_encoded_without_a_question(self, producer: ProducerScheduler) -> None:
        assert producer.ensure_available("r", [feature("a")])
        assert not producer.has_item("a")

    def test_cached_item_is_confirmed_first(self, producer: ProducerScheduler, worker: FakeWorker) -> None:
        producer.record_allocation("a")
        assert not producer.ensure_available("r", [feature("a"), feature("b")])
        assert not producer.ensure_available("r", [feature("a"), feature("b")])
        assert worker.receive() == [Confirm("a")]
        worker.send(Confirmed("a"))
        assert producer.ensure_available("r", [feature("a"), feature("b")])
        producer.close_step(["r"], ["a"])
        assert producer.ensure_available("r2", [feature("a")])

    def test_waiting_is_bounded(self, producer: ProducerScheduler, worker: FakeWorker, clock: Clock) -> None:
        producer.record_allocation("a")
        assert not producer.ensure_available("r", [feature("a")])
        clock.now_s += 1
        assert producer.ensure_available("r", [feature("a")])

    def test_worker_that_dies_leaves_no_request_waiting(self, producer: ProducerScheduler, worker: FakeWorker) -> None:
        producer.record_allocation("a")
        assert not producer.ensure_available("r", [feature("a")])
        worker.receive()
        worker.close()
        assert producer.ensure_available("r", [feature("a")])
