"""The producer's scheduler against a worker faked at the wire: what is encoded at once, what is confirmed first."""

from pathlib import Path

import pytest
from fake_worker import CONFIG, Clock, FakeWorker, feature

from epd_connector.link import Confirm, Confirmed, LinkClient
from epd_connector.metrics import Metrics
from epd_connector.producer_scheduler import ProducerScheduler


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
