"""Runs inside a container of the stack: damages what is in the Mooncake pool. Arguments: MODE KEY…

truncate and flip change the named objects; evict removes all embeddings, again and again, for SECONDS; fill leaves no
room for SECONDS. Each prints a line when it has begun.
"""

import mmap
import os
import sys
import time

from epd_connector.config import read_config
from epd_connector.device import HostDevice
from epd_connector.store.base import Store, StoreError, StoreFullError
from epd_connector.store.factory import make_store

BUFFER_BYTES = 8 << 20


def change(mode: str, data: bytearray) -> bytes:
    """Return what a truncation or a flipped bit in the middle makes of an object."""
    if mode == "truncate":
        return bytes(data[: len(data) // 2])
    data[len(data) // 2] ^= 1
    return bytes(data)


def evict(store: Store, seconds: float) -> None:
    """Remove all embeddings as fast as the master answers."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        try:
            store.remove_all()
        except StoreError as error:
            print(error, file=sys.stderr)
        time.sleep(0.002)


def fill(store: Store, slab: memoryview, seconds: float) -> None:
    """Take all room with objects under lease, ever smaller ones, and give it back at the end."""
    keys: list[str] = []
    store.remove_all()
    for size_bytes in (1 << 20, 128 << 10, 16 << 10, 4 << 10):
        try:
            while True:
                key = f"ballast/{len(keys)}"
                store.put(key, [slab[:size_bytes]])
                keys.append(key)
                store.exists(key)  # takes the lease
        except StoreFullError:
            continue
    print(f"full with {len(keys)} objects", flush=True)
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for key in keys:
            store.exists(key)
        time.sleep(1)
    for key in keys:
        store.remove(key)


def main(mode: str, *words: str) -> None:
    """Do one kind of damage and say so."""
    settings = {
        "master_server_address": "mooncake-master:50051",
        "metadata_server": "http://mooncake-master:8080/metadata",
        "rpc_timeout_ms": 10_000,  # what does the damage must not fail before what it is done to
    }
    store = make_store(read_config(settings), lambda: os.environ["EPD_ADVERTISE_HOST"], HostDevice())
    slab = memoryview(mmap.mmap(-1, BUFFER_BYTES))
    store.connect(slab)
    if mode == "evict":
        print("evicting", flush=True)
        return evict(store, float(words[0]))
    if mode == "fill":
        return fill(store, slab, float(words[0]))
    for key in words:
        size_bytes = store.get(key, slab[: store.find_size(key)])
        damaged = change(mode, bytearray(slab[:size_bytes]))
        store.remove(key)
        slab[: len(damaged)] = damaged
        store.put(key, [slab[: len(damaged)]])
        assert store.find_size(key) == len(damaged)
        print(f"{mode} {key}")
    return None


main(*sys.argv[1:])
