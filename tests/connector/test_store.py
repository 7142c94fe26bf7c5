"""What every backend promises (epd_connector.store.base.Store), and what the shared directory promises on top."""

import ctypes
import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mooncake_pool import MooncakePool

from epd_connector.config import read_config
from epd_connector.device import HostDevice
from epd_connector.header import Header, HeaderError, checksum, verify_object
from epd_connector.keys import hash_item_id
from epd_connector.store import spare
from epd_connector.store.base import Store, StoreError, StoreFullError, StoreUnavailableError
from epd_connector.store.factory import make_store
from epd_connector.store.shared_dir import DRAFT_LIFE_S, DRAFT_PREFIX, FOLDER, SharedDirStore

BUFFER_BYTES = 4 << 20
KEY = "ec/v1/model/item"


class Client:
    """A store with a registered buffer, and puts and gets of bytes through it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._array = bytearray(BUFFER_BYTES)
        ctypes.c_char.from_buffer(self._array)
        self.buffer = memoryview(self._array)
        store.connect(self.buffer)

    def put(self, key: str, data: bytes, offset: int = 0) -> None:
        self.buffer[offset : offset + len(data)] = data
        self.store.put(key, [self.buffer[offset : offset + len(data)]])

    def get(self, key: str, size_bytes: int, offset: int = 0) -> bytes | None:
        region = self.buffer[offset : offset + size_bytes]
        region[:] = b"\xee" * size_bytes
        count = self.store.get(key, region)
        return None if count is None else bytes(region[:count])


@pytest.fixture(params=["mooncake", "shared_dir"])
def extra(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    if request.param == "mooncake":
        pool: MooncakePool = request.getfixturevalue("pool")
        return pool.extra_config
    return {"store": "shared_dir", "shared_dir_path": str(tmp_path), "shared_dir_size_mb": 64}


def make(extra: dict[str, object]) -> Store:
    return make_store(read_config(extra), lambda: "127.0.0.1", HostDevice())


@pytest.fixture
def client(extra: dict[str, object]) -> Iterator[Client]:
    client = Client(make(extra))
    yield client
    client.store.close()


def test_absent_object_is_no_error(client: Client) -> None:
    assert not client.store.exists(KEY)
    assert client.store.find_size(KEY) is None
    assert client.get(KEY, 100) is None
    client.store.remove(KEY)


@pytest.mark.parametrize("size_bytes", [1, 4096, 1_000_003])
def test_object_comes_back_as_it_was(client: Client, size_bytes: int) -> None:
    data = os.urandom(size_bytes)
    client.put(KEY, data)
    assert client.store.exists(KEY)
    assert client.store.find_size(KEY) == size_bytes
    assert client.get(KEY, size_bytes, offset=2 << 20) == data


def test_parts_make_one_object(client: Client) -> None:
    data = os.urandom(100_260)
    client.buffer[: len(data)] = data
    ends = (0, 256, 256, 100_259, 100_260)  # one of them is empty
    client.store.put(KEY, [client.buffer[start:end] for start, end in itertools.pairwise(ends)])
    assert client.get(KEY, len(data), offset=1 << 20) == data


def test_shared_dir_takes_any_memory(tmp_path: Path) -> None:
    store = make({"store": "shared_dir", "shared_dir_path": str(tmp_path)})
    assert store.reaches_any_memory
    store.connect(memoryview(b""))
    store.put(KEY, [memoryview(b"header"), memoryview(b"payload")])
    out = memoryview(bytearray(13))
    assert store.get(KEY, out) == 13
    assert bytes(out) == b"headerpayload"


def test_object_that_is_there_is_not_replaced_until_it_is_removed(client: Client) -> None:
    client.put(KEY, b"first")
    client.put(KEY, b"second, longer")
    assert client.store.find_size(KEY) == 5
    assert client.get(KEY, 5) == b"first"
    client.store.remove(KEY)
    assert not client.store.exists(KEY)
    assert client.get(KEY, 5) is None
    client.put(KEY, b"second, longer")
    assert client.get(KEY, 14) == b"second, longer"


def test_full_store_makes_room_or_says_so(client: Client) -> None:
    refused = 0
    for number in range(100):  # 100 MB into 64 MB
        data = bytes([number]) * (1 << 20)
        try:
            client.put(f"{KEY}{number}", data)
        except StoreFullError:
            refused += 1
        else:
            assert client.get(f"{KEY}{number}", 1 << 20, offset=2 << 20) == data
    assert refused < 50


def read_whole_objects(reader: Client, size_bytes: int, number: int) -> set[bytes]:
    found = []
    deadline_s = time.monotonic() + 20
    while len(found) < number:
        assert time.monotonic() < deadline_s, f"read only {len(found)} times"
        try:
            data = reader.get(KEY, size_bytes) if reader.store.exists(KEY) else None
        except StoreError:
            continue  # removed under the read
        if data is not None:
            found.append(data)
    return set(found)


def make_object(letter: bytes) -> bytes:
    payload = letter * (128 << 10)
    return Header("bfloat16", (64, 1024), checksum(payload), hash_item_id("item")).pack() + payload


def test_readers_never_take_a_part_of_an_object(extra: dict[str, object], client: Client) -> None:
    """Two processes' worth of clients write one key at once, again and again, while a third reads it.

    They remove it in between, also under the reader, and then Mooncake gives its place to the next one at once: seen
    was the first half of one object with the second of another. That is what the checksum is for.
    """
    other, reader = Client(make(extra)), Client(make(extra))
    stop = threading.Event()
    objects = [make_object(b"a"), make_object(b"b")]

    def write(own: Client, data: bytes) -> None:
        while not stop.is_set():
            own.put(KEY, data)
            with suppress(StoreError):  # Mooncake refuses to remove what the other is writing
                own.store.remove(KEY)

    with ThreadPoolExecutor(2) as threads:
        done = [threads.submit(write, *work) for work in zip((client, other), objects, strict=True)]
        try:
            seen = read_whole_objects(reader, len(objects[0]), 50)
        finally:
            stop.set()
        for future in done:
            future.result()
    reader.store.close()
    other.store.close()
    assert seen & set(objects)
    for torn in seen - set(objects):
        assert extra.get("store") != "shared_dir", "a file gets its name when it is whole"
        with pytest.raises(HeaderError):
            verify_object(memoryview(torn), hash_item_id("item"), 64)


def test_object_is_absent_while_it_is_written_and_that_is_no_error(extra: dict[str, object], client: Client) -> None:
    """A consumer that waits for an item looks for it again and again, also while it is put."""
    reader = Client(make(extra))
    number, size_bytes = 40, 2 << 20

    def write() -> None:
        for index in range(number):
            client.put(f"{KEY}{index}", b"a" * size_bytes)
            client.store.remove(f"{KEY}{index}")

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(write)
        seen = set()
        while not done.done():
            for index in range(number):
                seen.add(reader.store.find_size(f"{KEY}{index}"))
        done.result()
    reader.store.close()
    assert seen <= {None, size_bytes}


def test_many_threads_at_once(client: Client) -> None:
    def run(number: int) -> bool:
        offset, key, data = number * 200_000, f"{KEY}{number}", os.urandom(100_000)
        client.put(key, data, offset)
        return client.get(key, len(data), offset) == data

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(16)))


def test_store_that_is_not_connected_says_so(extra: dict[str, object]) -> None:
    store = make(extra)
    with pytest.raises(StoreUnavailableError, match="not connected yet"):
        store.exists(KEY)
    store.close()


class TestSharedDir:
    @pytest.fixture
    def client(self, tmp_path: Path) -> Client:
        return Client(SharedDirStore(tmp_path, 1000))

    def test_name_of_a_file_does_not_come_from_the_key(self, client: Client, tmp_path: Path) -> None:
        for key in ("../../escape", "a\0b", "x" * 5000, ""):
            client.put(key, b"data")
            assert client.get(key, 4) == b"data"
        client.store.close()
        names = [path.name for path in (tmp_path / FOLDER).iterdir()]
        assert sorted(map(len, names)) == [64] * 4
        assert [path.name for path in tmp_path.iterdir()] == [FOLDER]

    def test_lookups_make_nothing(self, tmp_path: Path) -> None:
        client = Client(SharedDirStore(tmp_path, 1000))
        (tmp_path / FOLDER).rmdir()
        assert not client.store.exists(KEY)
        assert client.get(KEY, 4) is None
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(StoreUnavailableError):
            client.put(KEY, b"data")

    def test_least_recently_used_goes_first(self, client: Client, tmp_path: Path) -> None:
        for number, key in enumerate("abcde"):
            client.put(key, bytes(200))
            path = client.store._name(key)  # type: ignore[attr-defined]
            os.utime(path, (number, number))
        assert client.store.exists("a")
        client.put("f", bytes(200))
        assert {key for key in "abcdef" if client.store.exists(key)} == set("adef")

    @settings(max_examples=50)
    @given(puts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 1200)), max_size=40))
    def test_budget_holds_whatever_is_put(self, tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int]]):
        path = tmp_path_factory.mktemp("store")
        client = Client(SharedDirStore(path, 1000))
        for key, size_bytes in puts:
            try:
                client.put(str(key), bytes(size_bytes))
            except StoreFullError:
                assert size_bytes > 1000
            else:
                assert client.store.exists(str(key))
            assert sum(file.stat().st_size for file in (path / FOLDER).iterdir()) <= 1000

    def find_spare(self, client: Client) -> os.stat_result:
        # The file may have its size before it is handed over.
        path: Path = client.store._spare._making.result(timeout=20)  # type: ignore[attr-defined]
        return path.stat()

    def test_next_object_goes_into_a_file_that_has_its_pages(self, client: Client) -> None:
        client.put("a", bytes(200))
        found = self.find_spare(client)
        client.put("b", b"b" * 100)
        assert client.store._name("b").stat().st_ino == found.st_ino  # type: ignore[attr-defined]
        assert client.store.find_size("b") == 100
        assert client.get("b", 100) == b"b" * 100

    @pytest.mark.parametrize("size_bytes", [100, 300], ids=["is gone", "is too small"])
    def test_file_that_does_not_serve_is_done_without(self, client: Client, tmp_path: Path, size_bytes: int) -> None:
        client.put("a", bytes(200))
        self.find_spare(client)
        if size_bytes < 200:
            for path in (tmp_path / FOLDER).glob(f"{DRAFT_PREFIX}*"):
                path.unlink()
        client.put("b", b"b" * size_bytes)
        assert client.get("b", size_bytes) == b"b" * size_bytes

    def test_spare_file_that_was_not_begun_is_called_off_and_made_later(
        self, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(spare, "DELAY_S", 3600)
        client.put("a", bytes(200))
        client.store._scanned_at_s = float("-inf")  # type: ignore[attr-defined] # SCAN_INTERVAL_S has passed
        monkeypatch.setattr(spare, "DELAY_S", 0.0)
        client.put("b", bytes(200))
        assert self.find_spare(client).st_size == 200
        assert client.store._used_bytes == 600  # type: ignore[attr-defined]
        assert sum(file.stat().st_size for file in (tmp_path / FOLDER).iterdir()) == 600

    def test_nothing_but_objects_is_left(self, client: Client, tmp_path: Path) -> None:
        client.put("a", bytes(200))
        client.store.close()
        assert [path.stat().st_size for path in (tmp_path / FOLDER).iterdir()] == [200]

    def test_budget_holds_over_all_processes(self, client: Client, tmp_path: Path) -> None:
        others = [Client(SharedDirStore(tmp_path, 1000)) for _ in range(3)]
        for number in range(40):
            for index, one in enumerate(others):
                one.store._scanned_at_s = float("-inf")  # type: ignore[attr-defined] # SCAN_INTERVAL_S has passed
                one.put(f"{index}-{number}", bytes(90))
        objects, size_bytes = client.store.measure()  # type: ignore[attr-defined]
        assert size_bytes <= 1000
        assert objects == size_bytes // 90

    def test_what_a_killed_writer_left_is_removed_later(self, client: Client, tmp_path: Path) -> None:
        old, new = (tmp_path / FOLDER / f"{DRAFT_PREFIX}{name}" for name in ("old", "new"))
        for path in (old, new):
            path.write_bytes(b"half")
        os.utime(old, (time.time() - DRAFT_LIFE_S - 1,) * 2)
        client.put(KEY, b"data")
        assert not old.exists()
        assert new.exists()
        assert client.store.measure() == (1, 4)  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("number", "expected"),
        [(errno.ENOSPC, StoreFullError), (errno.ESTALE, StoreUnavailableError), (errno.EACCES, StoreError)],
    )
    def test_failed_write_leaves_nothing(
        self, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[StoreError]
    ) -> None:
        def fail(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(StoreError) as caught:
            client.put(KEY, b"data")
        assert type(caught.value) is expected
        assert list((tmp_path / FOLDER).iterdir()) == []

    def test_missing_directory_is_unavailable_and_may_come_later(self, tmp_path: Path) -> None:
        store = SharedDirStore(tmp_path / "mount", 1000)
        with pytest.raises(StoreUnavailableError, match="not a directory; mount it, or correct shared_dir_path"):
            store.connect(memoryview(b""))
        (tmp_path / "mount").mkdir()
        store.connect(memoryview(b""))
        assert not store.exists(KEY)
