"""Producer and consumer workers with the whole chain between them: slab, socket, real Mooncake master and pool."""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from ec_instances import BACKENDS, IDENTITY, STALL_S, Instance, Make, embedding, load, wait_until
from mooncake_pool import MooncakePool, find_port

from epd_connector.config import ConfigError, read_config
from epd_connector.device import HostDevice
from epd_connector.header import Header, checksum
from epd_connector.keys import build_key, hash_item_id
from epd_connector.store.factory import make_store


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
