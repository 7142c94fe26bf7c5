"""The whole chain when the store hangs, dies or comes late, or a part of ours fails: misses within their limits."""

import threading
import time
from pathlib import Path

import pytest
from ec_instances import BACKENDS, STALL_S, Instance, Make, embedding, wait_until
from mooncake_pool import MooncakePool


def check_misses(encode: Instance, consume: Instance, count: int) -> None:
    """Each item is a miss within publish_timeout_ms + fetch_timeout_ms, and what a loaded machine adds."""
    for number in range(count):
        started_s = time.monotonic()
        encode.encode(f"item{number}", embedding(seed=number))
        assert consume.take(f"item{number}", 64) is None
        assert time.monotonic() - started_s < 2


def test_hung_master_holds_the_scheduler_for_one_limit_only(make: Make, pool: MooncakePool) -> None:
    consume = make("consume", sync_fetch_timeout_ms=200)
    pool.pause_master()
    stalls_s = []
    while consume.is_healthy():
        taken, stall_s = consume.take_now(f"item{len(stalls_s)}", 64)
        assert taken is None
        stalls_s.append(stall_s)
        time.sleep(0.05)
    assert max(stalls_s) < 0.3
    assert sum(stalls_s) < 0.9  # an RPC that fails after 0.5 s is an answer: it is believed in once more
    # The breaker is open: answered at once, whatever the I/O threads hang in.
    assert max(consume.take_now(f"late{number}", 64)[1] for number in range(20)) < 0.05
    pool.resume_master()


@BACKENDS
def test_fault_of_our_own_is_a_miss_at_once(make_any: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, consume = make_any("encode"), make_any("consume", fetch_timeout_ms=20_000)
    encode.encode("a", embedding())
    service = consume.worker.service
    assert service is not None

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    for name in ("open", "accept"):
        with monkeypatch.context() as patch:
            patch.setattr(service.staging, name, fail)
            assert consume.take("a", 64) is None
        assert service.staging.allocator.used_bytes == 0
    assert consume.misses("store_error") == 2
    assert consume.take("a", 64) is not None


def test_embedding_that_cannot_be_staged_is_counted(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = make("encode")
    monkeypatch.setattr("epd_connector.staging.view_as_bytes", lambda _: 1 / 0)
    encode.encode("a", embedding())
    assert encode.metrics.snapshot()["epd_ec_publish_failures|store_error"] == 1
    assert encode.worker.service is not None
    assert encode.worker.service.staging.allocator.used_bytes == 0


def test_item_that_only_the_encoders_cache_has_is_published_again(make: Make, pool: MooncakePool) -> None:
    encode, consume = make("encode"), make("consume")
    encode.encode("a", embedding())
    pool.kill_master()
    pool.start_master()
    wait_until(lambda: not encode.is_healthy() or not consume.is_healthy())
    wait_until(lambda: encode.is_healthy() and consume.is_healthy())

    def arrives() -> bool:
        encode.encode("a", embedding())
        return consume.take("a", 64) is not None

    wait_until(arrives)  # the pool's owner needs a moment to come back
    assert encode.metrics.snapshot()["epd_ec_republished|"] == 1


def test_killed_master_costs_no_request_more_than_its_limits(make: Make, pool: MooncakePool) -> None:
    encode, consume = make("encode"), make("consume")
    pool.kill_master()
    check_misses(encode, consume, 10)
    assert not encode.is_healthy()
    assert not consume.is_healthy()
    started_s = time.monotonic()
    for number in range(100):
        encode.encode(f"late{number}", embedding(seed=number))
        assert consume.take(f"late{number}", 64) is None
    assert time.monotonic() - started_s < 10
    assert max(encode.slowest_stall_s, consume.slowest_stall_s) <= STALL_S
    pool.start_master()
    number = 0

    def hits() -> bool:
        nonlocal number
        number += 1
        encode.encode(f"new{number}", embedding(seed=number))
        return consume.take(f"new{number}", 64) is not None

    wait_until(hits, timeout_s=40)


def test_master_that_stutters_is_not_given_up(make: Make, pool: MooncakePool) -> None:
    encode, consume = make("encode"), make("consume")
    was_open = []
    for _ in range(3):
        pool.pause_master()
        time.sleep(0.7)  # longer than one RPC may take: a probe fails
        pool.resume_master()
        was_open.append(not encode.is_healthy() or not consume.is_healthy())
        time.sleep(1.2)
    assert not any(was_open)
    encode.encode("a", embedding())
    assert consume.take("a", 64) is not None


def test_one_late_answer_of_the_master_is_no_miss(make: Make, pool: MooncakePool) -> None:
    encode, consume = make("encode"), make("consume", fetch_timeout_ms=5000)
    encode.encode("a", embedding())
    pool.pause_master()
    resume = threading.Timer(0.7, pool.resume_master)  # longer than one RPC may take, shorter than two
    resume.start()
    assert consume.take("a", 64) is not None
    resume.join()


def test_master_that_hangs_costs_no_request_more_than_its_limits(make: Make, pool: MooncakePool) -> None:
    encode, consume = make("encode"), make("consume")
    pool.pause_master()
    check_misses(encode, consume, 8)
    wait_until(lambda: not encode.is_healthy() and not consume.is_healthy())
    started_s = time.monotonic()
    encode.encode("late", embedding())
    assert consume.take("late", 64) is None
    assert time.monotonic() - started_s < 0.5
    assert max(encode.slowest_stall_s, consume.slowest_stall_s) <= STALL_S
    pool.resume_master()
    wait_until(lambda: encode.is_healthy() and consume.is_healthy(), timeout_s=40)


def test_starts_without_a_master_and_uses_it_when_it_comes(pool: MooncakePool, tmp_path: Path) -> None:
    pool.kill_master()
    (tmp_path / "shm").mkdir()
    started_s = time.monotonic()
    consume = Instance(pool.extra_config, tmp_path / "shm", "consume", is_producer=False)
    assert consume.take("a", 64) is None
    assert consume.misses("store_down") == 1
    time.sleep(2)  # some probes more
    # Mooncake's own set-up would have held every thread of this process for 90 s.
    assert time.monotonic() - started_s < 30
    pool.start_master()
    wait_until(consume.is_healthy, timeout_s=30)
    consume.close()


def test_killed_pool_owner_is_a_miss(make: Make, pool: MooncakePool) -> None:
    encode, consume = make("encode"), make("consume")
    encode.encode("a", embedding())
    pool.kill_owner()
    started_s = time.monotonic()
    for _ in range(5):
        assert consume.take("a", 64) is None
    encode.encode("b", embedding())
    assert time.monotonic() - started_s < 5
