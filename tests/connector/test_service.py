"""Producer and consumer workers with the whole chain between them: slab, socket, real Mooncake master and pool."""

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from mooncake_pool import MooncakePool, find_port

from epd_connector.compat import Engine, Feature, Lookup, Place
from epd_connector.config import ConfigError, read_config
from epd_connector.device import HostDevice
from epd_connector.header import Header, checksum
from epd_connector.keys import ModelIdentity, build_key, hash_item_id
from epd_connector.link import LinkClient
from epd_connector.metadata import StepMetadata
from epd_connector.metrics import Metrics
from epd_connector.producer_scheduler import ProducerScheduler
from epd_connector.scheduler import ConsumerScheduler
from epd_connector.slab import name_directory
from epd_connector.store.factory import make_store
from epd_connector.worker import Worker

IDENTITY = ModelIdentity(model="tests/model", dtype="bfloat16")
STALL_S = 0.005
BACKENDS = pytest.mark.parametrize("any_store", ["mooncake", "mooncake, copied in hooks", "shared_dir"], indirect=True)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "condition did not come true"
        time.sleep(0.005)


def load(worker: Worker, metadata: StepMetadata) -> dict[str, torch.Tensor]:
    """Return what one rank has in its encoder cache after a step."""
    encoder_cache: dict[str, torch.Tensor] = {}
    worker.load(metadata, encoder_cache)
    return encoder_cache


class Instance:
    """One engine: its worker, its scheduler, and the calls vLLM makes in one step."""

    def __init__(
        self, store: dict[str, object], slab_dir: Path, name: str, *, is_producer: bool, ranks: int = 1, **extra: object
    ) -> None:
        config = read_config({**store, "slab_dir": str(slab_dir), "slab_size_mb": 16, **extra})
        engine = Engine(name, 0, ranks, is_producer, not is_producer, {}, IDENTITY)
        directory = name_directory(config.slab_dir, name, 0)
        self.metrics, self.scheduler_metrics = Metrics(), Metrics()
        own_store = make_store(config, lambda: "127.0.0.1", HostDevice())
        self.worker, *self.others = (
            Worker(
                config=config,
                engine=engine,
                place=Place(rank),
                directory=directory,
                device=HostDevice(),
                metrics=self.metrics,
                store=None if rank else own_store,
            )
            for rank in range(ranks)
        )
        self.metadata = StepMetadata()
        make = ProducerScheduler if is_producer else ConsumerScheduler
        self.scheduler: ProducerScheduler | ConsumerScheduler = make(
            config, LinkClient(directory), self.scheduler_metrics
        )
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self.requests = 0
        self.slowest_stall_s = 0.0

    def is_healthy(self) -> bool:
        service = self.worker.service
        return service is not None and not service.breaker.is_open

    def defer(self, *features: Feature) -> None:
        """Poll like vLLM until the request may be scheduled."""
        self.requests += 1
        while True:
            started_s = time.thread_time()
            is_available = self.scheduler.ensure_available(f"request-{self.requests}", features)
            # CPU time of this thread: what a loaded machine adds to the wall clock is not ours. A blocking call is
            # bounded by the tests' deadlines, which are wall clock.
            self.slowest_stall_s = max(self.slowest_stall_s, time.thread_time() - started_s)
            if is_available:
                return
            time.sleep(0.001)

    def encode(self, item_id: str, tensor: torch.Tensor) -> None:
        self.defer(Feature(item_id, len(tensor), len(tensor)))
        if item_id not in self.encoder_cache:
            self.scheduler.record_allocation(item_id)
            self.encoder_cache[item_id] = tensor
            self.worker.save(self.encoder_cache, item_id)
        self.worker.finish_step()
        self.scheduler.close_step([f"request-{self.requests}"], [])

    def take(self, item_id: str, rows: int) -> torch.Tensor | None:
        """Return the embedding from the store, None when vLLM would have to encode it."""
        self.defer(Feature(item_id, rows, rows))
        self.scheduler.has_item(item_id)
        self.scheduler.record_allocation(item_id)
        self.metadata = self.scheduler.close_step([f"request-{self.requests}"], [])
        taken = load(self.worker, self.metadata).get(item_id)
        self.scheduler.close_step([], [item_id])  # an encoder cache that keeps nothing
        return taken

    def take_now(self, item_id: str, rows: int) -> tuple[torch.Tensor | None, float]:
        """Like ``take``, but vLLM does not announce the request; return the standstill too, in seconds."""
        self.requests += 1
        assert isinstance(self.scheduler, ConsumerScheduler)
        started_s = time.monotonic()
        lookup = Lookup(f"request-{self.requests}", [Feature(item_id, rows, rows)])
        self.scheduler.has_item(item_id, lookup)
        stall_s = time.monotonic() - started_s
        self.scheduler.record_allocation(item_id)
        taken = load(self.worker, self.scheduler.close_step([lookup.request_id], [])).get(item_id)
        self.scheduler.close_step([], [item_id])
        return taken, stall_s

    def misses(self, reason: str) -> float:
        return self.scheduler_metrics.snapshot().get(f"epd_ec_misses|{reason}", 0)

    def close(self) -> None:
        self.scheduler.close()
        self.worker.close()


Make = Callable[..., Instance]


@pytest.fixture
def store(pool: MooncakePool) -> dict[str, object]:
    """Settings of the store; parametrised by those tests that hold for every backend."""
    return pool.extra_config


@pytest.fixture
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    if request.param.startswith("mooncake"):
        pool: MooncakePool = request.getfixturevalue("pool")
        return {**pool.extra_config, "copy_in_hooks": request.param != "mooncake"}
    (tmp_path / "store").mkdir()
    return {"store": "shared_dir", "shared_dir_path": str(tmp_path / "store"), "shared_dir_size_mb": 64}


@pytest.fixture
def make(store: dict[str, object], tmp_path: Path) -> Iterator[Make]:
    yield from make_instances(store, tmp_path / "shm")


@pytest.fixture
def make_any(any_store: dict[str, object], tmp_path: Path) -> Iterator[Make]:
    yield from make_instances(any_store, tmp_path / "shm")


def make_instances(store: dict[str, object], slab_dir: Path) -> Iterator[Make]:
    instances: list[Instance] = []
    slab_dir.mkdir()

    def start(name: str, **options: object) -> Instance:
        is_producer = name.startswith("encode")
        instance = Instance(store, slab_dir, name, is_producer=is_producer, **options)
        instances.append(instance)
        wait_until(instance.is_healthy)
        return instance

    yield start
    for instance in instances:
        instance.close()
    assert list(slab_dir.iterdir()) == []


def embedding(rows: int = 64, width: int = 128, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@BACKENDS
def test_embedding_arrives_bit_for_bit(make_any: Make, dtype: torch.dtype) -> None:
    encode, consume = make_any("encode"), make_any("consume")
    tensor = embedding(dtype=dtype)
    encode.encode("a", tensor)
    taken = consume.take("a", 64)
    assert taken is not None
    assert taken.dtype == dtype
    assert torch.equal(taken, tensor)


@BACKENDS
def test_view_with_strides_arrives_and_stays_as_it_is(make_any: Make) -> None:
    encode, consume = make_any("encode"), make_any("consume", slab_size_mb=1)
    tensor = embedding(width=256)[:, ::2]
    assert not tensor.is_contiguous()
    encode.encode("a", tensor)
    taken = consume.take("a", 64)
    for number in range(80):  # the slab is used again and again under it
        encode.encode(f"other{number}", embedding(seed=number + 1))
        assert consume.take(f"other{number}", 64) is not None
    assert taken is not None
    assert torch.equal(taken, tensor)


@BACKENDS
def test_every_rank_loads_from_one_slab_and_the_slowest_finds_it_as_it_was(make_any: Make) -> None:
    encode, consume = make_any("encode"), make_any("consume", ranks=2, slab_size_mb=1)
    (slow_rank,) = consume.others
    steps = []
    while len(steps) < 1000:  # until the slab is full of what the slow rank has not read
        name, tensor = f"item{len(steps)}", embedding(seed=len(steps))
        encode.encode(name, tensor)
        taken = consume.take(name, 64)
        if taken is None:
            break
        assert torch.equal(taken, tensor)
        steps.append((name, tensor, consume.metadata))
    assert 30 < len(steps) < 60
    for name, tensor, metadata in steps:
        assert torch.equal(load(slow_rank, metadata)[name], tensor)
    encode.encode("last", embedding())
    assert consume.take("last", 64) is not None


@BACKENDS
def test_item_is_visible_when_the_encode_step_ends(make_any: Make) -> None:
    encode, consume = make_any("encode"), make_any("consume")
    for number in range(30):
        encode.encode(f"item{number}", embedding(seed=number))
        assert consume.take(f"item{number}", 64) is not None
    assert encode.metrics.snapshot()["epd_ec_published|"] == 30
    assert consume.scheduler_metrics.snapshot()["epd_ec_hits|"] == 30
    assert "epd_ec_local_encodes|" not in consume.scheduler_metrics.snapshot()
    assert max(encode.slowest_stall_s, consume.slowest_stall_s) <= STALL_S


@BACKENDS
def test_embedding_outlives_its_encoder(make_any: Make) -> None:
    encode, consume = make_any("encode"), make_any("consume")
    encode.encode("a", embedding())
    encode.close()
    assert consume.take("a", 64) is not None


@BACKENDS
def test_unannounced_request_gets_its_item_too(make_any: Make) -> None:
    encode, consume = make_any("encode"), make_any("consume")
    encode.encode("a", embedding())
    taken, _ = consume.take_now("a", 64)
    assert taken is not None
    assert torch.equal(taken, embedding())
    assert consume.take_now("absent", 64)[0] is None
    assert consume.misses("absent") == 1
    assert consume.take_now("a", 65)[0] is None
    assert consume.misses("wrong_rows") == 1


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


@BACKENDS
def test_absent_item_is_a_miss(make_any: Make) -> None:
    consume = make_any("consume")
    assert consume.take("never", 64) is None
    assert consume.misses("absent") == 1


def test_other_row_count_is_a_miss_and_the_object_stays(make: Make) -> None:
    encode, consume = make("encode"), make("consume")
    encode.encode("a", embedding())
    assert consume.take("a", 63) is None
    assert consume.misses("wrong_rows") == 1
    assert consume.take("a", 64) is not None


@pytest.fixture
def raw_store(any_store: dict[str, object]) -> Iterator[Callable[[str, bytes], None]]:
    """Writes any bytes under an item's key, as a broken writer would."""
    store = make_store(read_config(any_store), lambda: "127.0.0.1", HostDevice())
    buffer = bytearray(1 << 20)
    ctypes.c_char.from_buffer(buffer)
    store.connect(memoryview(buffer))

    def write(item_id: str, data: bytes) -> None:
        buffer[: len(data)] = data
        store.put(build_key(IDENTITY.digest(), item_id), [memoryview(buffer)[: len(data)]])

    yield write
    store.close()


def packed(item_id: str = "a") -> bytes:
    payload = bytes(64 * 128 * 2)
    return Header("bfloat16", (64, 128), checksum(payload), hash_item_id(item_id)).pack() + payload


@pytest.mark.parametrize(
    "data",
    [b"short", packed()[:-1], packed()[:1000] + b"\1" + packed()[1001:], packed("b"), bytes(5000)],
    ids=["no header", "truncated", "corrupted", "another item's", "zeros"],
)
@BACKENDS
def test_bad_object_is_never_used_and_heals(
    make_any: Make, raw_store: Callable[[str, bytes], None], data: bytes
) -> None:
    encode, consume = make_any("encode"), make_any("consume")
    raw_store("a", data)
    assert consume.take("a", 64) is None
    assert consume.misses("corrupt") == 1
    encode.encode("a", embedding())
    taken = consume.take("a", 64)
    assert taken is not None
    assert torch.equal(taken, embedding())


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
    for number in range(10):
        started_s = time.monotonic()
        encode.encode(f"item{number}", embedding(seed=number))
        assert consume.take(f"item{number}", 64) is None
        # publish_timeout_ms + fetch_timeout_ms, and what a loaded machine adds
        assert time.monotonic() - started_s < 2
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
    for number in range(8):
        started_s = time.monotonic()
        encode.encode(f"item{number}", embedding(seed=number))
        assert consume.take(f"item{number}", 64) is None
        assert time.monotonic() - started_s < 2
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


@BACKENDS
def test_more_images_than_the_pool_and_the_slab_hold(make_any: Make) -> None:
    encode, consume = make_any("encode", slab_size_mb=4), make_any("consume", slab_size_mb=4)
    hits = 0
    for number in range(100):  # 100 MB through a pool of 64 MB
        tensor = embedding(rows=512, width=1024, seed=number)
        encode.encode(f"item{number}", tensor)
        taken = consume.take(f"item{number}", 512)
        if taken is not None:
            hits += 1
            assert torch.equal(taken, tensor)
    assert hits >= 50
    service = consume.worker.service
    assert service is not None
    assert service.staging.allocator.used_bytes <= 4 << 20
    assert encode.worker.service is not None
    assert encode.worker.service.staging.allocator.used_bytes == 0


def test_item_larger_than_the_slab_is_not_published(make: Make) -> None:
    encode = make("encode", slab_size_mb=1)
    encode.encode("big", embedding(rows=4096, width=256))
    assert encode.metrics.snapshot()["epd_ec_publish_failures|too_large"] == 1


def test_metrics_of_both_processes_on_one_port(make: Make) -> None:
    port = find_port()
    encode, consume = make("encode"), make("consume", metrics_port=port, metrics_host="127.0.0.1")
    encode.encode("a", embedding())
    consume.take("a", 64)
    consume.take("b", 64)
    consume.scheduler.send_counts()

    def read() -> str:
        with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            return str(response.read().decode())

    wait_until(lambda: "epd_ec_hits_total 1.0" in read())
    text = read()
    assert 'epd_ec_misses_total{reason="absent"} 1.0' in text
    assert 'epd_ec_misses_total{reason="corrupt"} 0.0' in text
    assert "epd_ec_local_encodes_total 1.0" in text
    assert "epd_ec_get_bytes_total 16640.0" in text
    assert "epd_ec_breaker_open 0.0" in text


def test_what_was_counted_is_in_the_log_once(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("epd_connector.service.LOG_INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, "epd_connector")
    encode = make("encode", probe_interval_ms=50)
    encode.encode("a", embedding())
    wait_until(lambda: "published=1" in caplog.text)
    encode.encode("b", embedding(seed=1))
    wait_until(lambda: caplog.text.count("published=1") == 2)
    assert "published=2" not in caplog.text  # each line tells of what came since the one before


def test_taken_metrics_port_is_refused_and_leaves_nothing(make: Make, pool: MooncakePool, tmp_path: Path) -> None:
    port = find_port()
    make("consume", metrics_port=port, metrics_host="127.0.0.1")
    with pytest.raises(ConfigError, match="metrics_port: cannot listen on"):
        Instance(
            pool.extra_config, tmp_path / "shm", "other", is_producer=False, metrics_port=port, metrics_host="127.0.0.1"
        )
    assert len(list((tmp_path / "shm").iterdir())) == 1


def test_close_ends_every_thread(make: Make) -> None:
    instance = make("encode")
    instance.encode("a", embedding())
    instance.close()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("epd-ec")] == []
