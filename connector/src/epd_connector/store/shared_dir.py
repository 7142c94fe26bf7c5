"""A directory as backend: a sized tmpfs for instances of one host, or a file system that several hosts mount.

One file per object, named by the hash of its key. A file gets its name only when it is whole. It is not synced to
the disk first: what a crash of the host leaves behind fails the checksum of :mod:`epd_connector.header` and is
removed, and an encoder can make any object again.

The size budget holds over all processes that use the directory. Each looks through it once in ``SCAN_INTERVAL_S`` and
counts its own puts in between, so that the budget can be exceeded by what others put in that time.
"""

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .base import StoreError, StoreFullError, StoreUnavailableError
from .spare import SpareFile

FOLDER = "epd-ec-v1"
SCAN_INTERVAL_S = 1.0
KEPT_SHARE = 0.95
"""Share of the budget that an eviction leaves, so that not every put of a full store evicts."""
DRAFT_PREFIX = ".draft-"
DRAFT_LIFE_S = 60.0
"""A draft that nobody wrote to for so long is what a killed process left."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_UNAVAILABLE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN)


class SharedDirStore:
    """Objects in ``path``, which has to be there, of at most ``size_limit_bytes`` together; least recently used go."""

    reaches_any_memory = True

    def __init__(self, path: Path, size_limit_bytes: int) -> None:
        self._root = path
        self._folder = path / FOLDER
        self._size_limit_bytes = size_limit_bytes
        self._is_connected = False
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._spare = SpareFile(self._name_draft)
        self._scanned_at_s = float("-inf")

    def connect(self, memory: memoryview) -> None:  # noqa: ARG002 - files need no registered memory
        """See Store. Makes the only folder there is, readable for the user alone."""
        with _translated("connect"):
            if not self._root.is_dir():
                raise StoreUnavailableError(f"{self._root} is not a directory; mount it, or correct shared_dir_path")
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
                raise StoreUnavailableError(f"{self._folder} is not readable and writable for uid {os.getuid()}")
        self._is_connected = True

    def exists(self, key: str) -> bool:
        """See Store. Keeps it from eviction while others were used longer ago."""
        return self.find_size(key) is not None

    def find_size(self, key: str) -> int | None:
        """See Store."""
        path = self._name(key)
        with _translated("stat"):
            try:
                size_bytes = path.stat().st_size
                os.utime(path)  # the order of eviction; access times are off on many mounts
            except FileNotFoundError:
                return None
            return size_bytes

    def put(self, key: str, parts: Sequence[memoryview]) -> None:
        """See Store."""
        if self.exists(key):
            return
        size_bytes = sum(map(len, parts))
        draft = self._take_spare(size_bytes) or self._name_draft()
        self._make_room(size_bytes)
        with _translated("put"):
            try:
                _write(draft, parts)
                draft.rename(self._name(key))
            except OSError:
                draft.unlink(missing_ok=True)
                raise
        self._make_spare(size_bytes)

    def get(self, key: str, out: memoryview) -> int | None:
        """See Store."""
        path = self._name(key)
        with _translated("get"):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                done = 0
                while done < len(out) and (count := os.readv(file, [out[done:]])):
                    done += count
                return done
            finally:
                os.close(file)

    def remove(self, key: str) -> None:
        """See Store."""
        path = self._name(key)
        with _translated("remove"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """See Store."""
        self._is_connected = False
        with self._lock:
            self._spare.close()

    def measure(self) -> tuple[int, int]:
        """Return the number of objects and their size in bytes together."""
        with _translated("scan"):
            sizes = [size for _, size, entry in self._list_files() if not entry.name.startswith(DRAFT_PREFIX)]
            return len(sizes), sum(sizes)

    def remove_all(self) -> int:
        """Remove every object; return how many there were."""
        with _translated("remove"):
            entries = [entry for _, _, entry in self._list_files()]
            for entry in entries:
                Path(entry.path).unlink(missing_ok=True)
            return sum(not entry.name.startswith(DRAFT_PREFIX) for entry in entries)

    def _name(self, key: str) -> Path:
        if not self._is_connected:
            raise StoreUnavailableError(f"{self._root} is not connected yet")
        return self._folder / hashlib.sha256(key.encode()).hexdigest()

    def _name_draft(self) -> Path:
        return self._folder / f"{DRAFT_PREFIX}{os.getpid()}-{os.urandom(8).hex()}"

    def _take_spare(self, size_bytes: int) -> Path | None:
        """Return a file with pages for an object, out of the budget again; None where a new one serves better."""
        with self._lock:
            path, spare_bytes = self._spare.take()
            self._used_bytes -= spare_bytes
        if path is None:
            return None
        if size_bytes > spare_bytes:
            path.unlink(missing_ok=True)
            return None
        return path

    def _make_spare(self, size_bytes: int) -> None:
        """Ready a file for the next put, within the budget: nothing is evicted for it."""
        with self._lock:
            if self._spare.is_wanted and self._used_bytes + size_bytes <= self._size_limit_bytes:
                self._used_bytes += size_bytes
                self._spare.make(size_bytes)

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._size_limit_bytes:
            raise StoreFullError(
                f"object has {size_bytes} bytes, the whole directory may have {self._size_limit_bytes}"
            )
        with self._lock, _translated("evict"):
            is_full = self._used_bytes + size_bytes > self._size_limit_bytes
            if is_full or time.monotonic() - self._scanned_at_s >= SCAN_INTERVAL_S:
                self._scan_and_evict(size_bytes)
            self._used_bytes += size_bytes

    def _scan_and_evict(self, wanted_bytes: int) -> None:
        self._spare.settle()
        files = sorted(self._list_files(), key=lambda file: file[0])
        used_bytes = sum(size for _, size, _ in files)
        if used_bytes + wanted_bytes > self._size_limit_bytes and self._spare.discard():
            files = sorted(self._list_files(), key=lambda file: file[0])
            used_bytes = sum(size for _, size, _ in files)
        dead_before_s = time.time() - DRAFT_LIFE_S
        is_full = used_bytes + wanted_bytes > self._size_limit_bytes
        target_bytes = max(0, int(KEPT_SHARE * self._size_limit_bytes) - wanted_bytes)
        for used_at_s, size_bytes, entry in files:
            is_draft = entry.name.startswith(DRAFT_PREFIX)
            if used_at_s < dead_before_s if is_draft else is_full and used_bytes > target_bytes:
                Path(entry.path).unlink(missing_ok=True)
                used_bytes -= size_bytes
        self._used_bytes = used_bytes
        self._scanned_at_s = time.monotonic()

    def _list_files(self) -> Iterator[tuple[float, int, "os.DirEntry[str]"]]:
        """Yield time of last use (s since the epoch), size in bytes and entry of every file."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # evicted by another process meanwhile
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime, found.st_size, entry


def _write(path: Path, parts: Sequence[memoryview]) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        for part in parts:
            done = 0
            while done < len(part):
                done += os.write(file, part[done:])
        os.ftruncate(file, sum(map(len, parts)))  # a spare may be longer
    finally:
        os.close(file)  # raises what a network file system put off


@contextlib.contextmanager
def _translated(operation: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"{operation} in the shared directory: {error}"
        if error.errno in _NO_SPACE:
            raise StoreFullError(text) from error
        if error.errno in _UNAVAILABLE:
            raise StoreUnavailableError(text) from error
        raise StoreError(text) from error
