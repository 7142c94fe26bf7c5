"""Shared memory between the ranks of one engine, in a directory of its own on a tmpfs.

The directory holds the slab file and the socket of :mod:`.link`. Its owner, the worker that talks to the
store, keeps a lock on it, so that a later engine can tell a dead owner's directory and remove it.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import ConfigError

PAGE_SIZE_BYTES = 4096
MAX_RANKS = PAGE_SIZE_BYTES // 8
_PREFIX = "epd-ec-"
_WAIT_SLICE_S = 0.002


def name_directory(slab_dir: str, engine_id: str, data_parallel_rank: int) -> Path:
    """Return where the engine's ranks and its scheduler meet; hashed, because a socket path has 107 bytes at most."""
    digest = hashlib.sha256(engine_id.encode()).hexdigest()[:16]
    return Path(slab_dir) / f"{_PREFIX}{digest}-dp{data_parallel_rank}"


class OwnedDirectory:
    """Creates the directory (mode 0700), removes it on close. Raises ConfigError when a live engine has it."""

    def __init__(self, path: Path) -> None:
        for other in path.parent.glob(f"{_PREFIX}*"):
            _remove_when_dead(other)
        self.path = path
        # Locked before it has its name: nobody can take it for a dead owner's in between.
        draft = Path(tempfile.mkdtemp(prefix=".epd-ec-", dir=path.parent))
        self._lock = os.open(draft / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            draft.rename(path)
        except OSError as error:
            os.close(self._lock)
            shutil.rmtree(draft, ignore_errors=True)
            raise ConfigError([f"engine_id: {path} is in use by another engine; give each an id of its own"]) from error

    def close(self) -> None:
        """Remove the directory. Memory that is mapped somewhere stays valid there."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_when_dead(path: Path) -> None:
    with contextlib.suppress(OSError):  # someone else's, gone, or in use: not ours to remove
        lock = os.open(path / "lock", os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        finally:
            os.close(lock)


class Slab:
    """A mapped slab file: one page of progress marks, then ``data``.

    Each rank that copies embeddings writes the number of the last step it finished into its own mark, so
    that the owner knows when a region can be used again. Marks are aligned 8-byte words, one writer each.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # no page faults later, on a model thread
            self._map = mmap.mmap(file.fileno(), 0, flags=flags)
        view = memoryview(self._map)
        self._marks = view[:PAGE_SIZE_BYTES].cast("Q")
        self.data = view[PAGE_SIZE_BYTES:]

    @classmethod
    def create(cls, path: Path, size_bytes: int) -> "Slab":
        """Make a slab with ``size_bytes`` of data. Raises ConfigError when the file system has no room for it."""
        with path.open("xb") as file:
            try:
                # Reserve it now: a write to a full tmpfs through a mapping kills the process with SIGBUS.
                os.posix_fallocate(file.fileno(), 0, PAGE_SIZE_BYTES + size_bytes)
            except OSError as error:
                raise ConfigError([_explain_no_room(path, size_bytes, error)]) from error
        return cls(path)

    def mark_step(self, rank: int, step: int) -> None:
        """Say that ``rank`` has finished all copies of ``step`` and those before."""
        self._marks[rank] = step

    def find_finished_step(self, ranks: int) -> int:
        """Return the last step that all of the first ``ranks`` ranks have finished."""
        return min(self._marks[:ranks])


def _explain_no_room(path: Path, size_bytes: int, error: OSError) -> str:
    free_mb = shutil.disk_usage(path.parent).free >> 20
    return (
        f"slab_size_mb: {size_bytes >> 20} MB do not fit into {path.parent.parent} "
        f"({free_mb} MB free, {error.strerror}): give the container more shared memory (shm_size) or lower slab_size_mb"
    )


class Allocator:
    """First-fit allocation of page-aligned regions of the slab. Thread-safe; holds no memory itself.

    ``finished_step`` tells the last step whose copies all ranks have finished; regions that were given
    back with a later step are kept until then. ``on_free`` is called with the offset of each that can be used again.
    """

    def __init__(
        self,
        size_bytes: int,
        finished_step: Callable[[], int] = lambda: 0,
        on_free: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.size_bytes = size_bytes - size_bytes % PAGE_SIZE_BYTES
        self._finished_step = finished_step
        self._on_free = on_free
        self._free: list[tuple[int, int]] = [(0, self.size_bytes)]
        self._used: dict[int, int] = {}
        self._leaving: dict[int, int] = {}
        self._changed = threading.Condition()

    @property
    def used_bytes(self) -> int:
        """Bytes that are given out or not yet reusable."""
        with self._changed:
            return sum(self._used.values())

    def allocate(self, size_bytes: int, timeout_s: float = 0.0) -> int | None:
        """Return the offset of a free region, None when none came free in time."""
        with self._changed:
            deadline_s = time.monotonic() + timeout_s
            while not self._fits(size_bytes) and (left_s := deadline_s - time.monotonic()) > 0:
                # In slices: nobody notifies when another process finishes a step.
                self._changed.wait(min(left_s, _WAIT_SLICE_S))
            return self._take(size_bytes)

    def release(self, offset: int, after_step: int = 0) -> None:
        """Give a region back, to be reused once all ranks have finished ``after_step``.

        Raises ValueError when no region that is given out starts at ``offset``.
        """
        with self._changed:
            if offset not in self._used or offset in self._leaving:
                raise ValueError(f"no region in use starts at {offset}")
            self._leaving[offset] = after_step
            self._reclaim()
            self._changed.notify_all()

    def _fits(self, size_bytes: int) -> bool:
        self._reclaim()
        return any(size >= size_bytes for _, size in self._free)

    def _take(self, size_bytes: int) -> int | None:
        needed = max(PAGE_SIZE_BYTES, -(-size_bytes // PAGE_SIZE_BYTES) * PAGE_SIZE_BYTES)
        for index, (offset, size) in enumerate(self._free):
            if size >= needed:
                self._free[index : index + 1] = [(offset + needed, size - needed)] if size > needed else []
                self._used[offset] = needed
                return offset
        return None

    def _reclaim(self) -> None:
        if not self._leaving:
            return
        finished = self._finished_step()
        done = [offset for offset, step in self._leaving.items() if step <= finished]
        for offset in done:
            del self._leaving[offset]
            self._on_free(offset)
        regions = [*self._free, *((offset, self._used.pop(offset)) for offset in done)]
        self._free = _merge(sorted(regions))


def _merge(regions: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, size in regions:
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((offset, size))
    return merged
