"""The consumer's scheduler for requests that vLLM does not announce: one standstill, as long as its limit at most."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_worker import CONFIG, FakeWorker, feature, ready

from epd_connector.compat import Lookup
from epd_connector.link import Fetch, LinkClient, Missing, Reply, Request
from epd_connector.metrics import Metrics
from epd_connector.scheduler import ConsumerScheduler


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
