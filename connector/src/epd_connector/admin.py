"""What an operator asks of a store: what is in it, does it work, empty it. Behind the command ``epd-ec``."""

import mmap
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from .config import ConnectorConfig
from .device import HostDevice
from .keys import KEY_PREFIX
from .store.base import Store, StoreError, StoreUnavailableError
from .store.factory import make_store
from .store.mooncake_admin import get_text, read_pool
from .store.shared_dir import SharedDirStore

CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Usage:
    """What a store holds. Mooncake's bytes are the whole pool's, with what others keep there. None: not counted."""

    objects: int
    used_bytes: int
    capacity_bytes: int
    evicted_objects: int | None = None
    objects_by_model: dict[str, int] | None = None


@dataclass(frozen=True)
class Speed:
    """Median times of a put and a get of one object, in seconds."""

    size_bytes: int
    rounds: int
    put_s: float
    get_s: float


def measure_usage(config: ConnectorConfig, master_metrics_url: str) -> Usage:
    """Return what the store holds; a Mooncake master is asked over HTTP. Raises StoreError."""
    if config.store == "shared_dir":
        capacity_bytes = config.shared_dir_size_mb << 20
        store = SharedDirStore(Path(config.shared_dir_path), capacity_bytes)
        store.connect(memoryview(b""))
        objects, used_bytes = store.measure()
        return Usage(objects, used_bytes, capacity_bytes)
    pool = read_pool(master_metrics_url)
    objects = sum(pool.objects_by_model.values())
    return Usage(objects, pool.used_bytes, pool.capacity_bytes, pool.evicted_objects, pool.objects_by_model)


def count_hits(metrics_urls: Sequence[str]) -> tuple[int, int]:
    """Return how many items the consumers with these metrics ports took from the store, and how many they encoded.

    Raises StoreUnavailableError when one does not answer: a part of the sum would pass for the whole.
    """
    sums: Counter[str] = Counter()
    for url in metrics_urls:
        for family in text_string_to_metric_families(get_text(url)):
            sums.update({sample.name: int(sample.value) for sample in family.samples})
    return sums["epd_ec_hits_total"], sums["epd_ec_local_encodes_total"]


def measure_speed(config: ConnectorConfig, size_bytes: int, rounds: int) -> Speed:
    """Put, read back and compare objects of random bytes, and remove them. Raises StoreError."""
    with mmap.mmap(-1, 2 * size_bytes) as memory, memoryview(memory) as slab, _connected(config, slab) as store:
        source, target = slab[:size_bytes], slab[size_bytes:]
        with source, target:
            times = [_measure_round(store, source, target) for _ in range(rounds)]
    puts_s, gets_s = (sorted(column) for column in zip(*times, strict=True))
    return Speed(size_bytes, rounds, puts_s[rounds // 2], gets_s[rounds // 2])


def purge(config: ConnectorConfig) -> int:
    """Remove every embedding and return how many there were. Raises StoreError."""
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as slab, _connected(config, slab) as store:
        return store.remove_all()


def _measure_round(store: Store, source: memoryview, target: memoryview) -> tuple[float, float]:
    key = f"{KEY_PREFIX}/check/{os.urandom(16).hex()}"
    source[:] = os.urandom(len(source))
    target[:] = bytes(len(target))  # also touches every page: the first use of memory is not the store's time
    started_s = time.perf_counter()
    store.put(key, [source])
    put_s = time.perf_counter()
    read_bytes = store.get(key, target)
    got_s = time.perf_counter()
    store.remove(key)
    if read_bytes is None:
        raise StoreError("the store accepted an object and had none to give back: is its pool's owner down, or full?")
    if read_bytes != len(source) or source != target:
        raise StoreError("the store gave back other bytes than it was given")
    return put_s - started_s, got_s - put_s


@contextmanager
def _connected(config: ConnectorConfig, slab: memoryview) -> Iterator[Store]:
    own_address = ""
    if config.store == "mooncake":
        # Before Mooncake is asked: its set-up takes 90 s to say that there is no master.
        own_address = _find_own_address(config.master_server_address)
    store = make_store(config, lambda: own_address, HostDevice())
    store.connect(slab)
    try:
        yield store
    finally:
        store.close()


def _find_own_address(master: str) -> str:
    """Return this host's address towards the master. Raises StoreUnavailableError when nothing listens there."""
    host, _, port = master.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise StoreUnavailableError(f"no Mooncake master at {master}: {error}") from error
