"""A file on a tmpfs that has its pages, mapped here, before there is anything to write into them.

Getting pages costs more than filling them, and a write by the kernel three times a copy to mapped memory: 8 MiB into a
new file took 4.7 ms, into one whose pages were there 1.5 ms, into a mapped one 0.5 ms. So after each put another thread
readies a file for the next one. On a tmpfs only: what is reserved there can be written for sure, while on a network or
a disk a mapped write may fail later, which would end the process (SIGBUS).
"""

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_TMPFS_MAGIC = 0x01021994  # linux/magic.h


@dataclass(frozen=True)
class Spare:
    """A file with its memory, which stays valid after the file was renamed, cut short behind it, or removed."""

    path: Path
    data: memoryview


class SpareFile:
    """At most one file in reserve; ``name`` gives a new path in its folder. Its user keeps threads apart.

    Others may remove the file at any time. Where there is no room, there is none.
    """

    def __init__(self, name: Callable[[], Path]) -> None:
        self._name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="epd-ec-spare")
        self._making: Future[Spare | None] | None = None
        self.size_bytes = 0
        """Of the file that is there or in the making."""

    def make(self, size_bytes: int) -> None:
        """Begin to ready a file of this size."""
        self.size_bytes = size_bytes
        self._making = self._thread.submit(_make, self._name(), size_bytes)

    def take(self) -> Spare | None:
        """Hand the file over, if there is one."""
        if self._making is None or not self._making.done():
            return None
        spare, self._making, self.size_bytes = self._making.result(), None, 0
        return spare

    def discard(self) -> bool:
        """Remove the file, also one that is in the making; return whether there was one."""
        self.settle()
        spare = self.take()
        if spare is not None:
            spare.path.unlink(missing_ok=True)
        return spare is not None

    def settle(self) -> None:
        """Wait for the file in the making."""
        if self._making is not None:
            self._making.result()

    def close(self) -> None:
        """Remove the file, and make no other."""
        self._thread.shutdown()
        self.discard()


def is_on_tmpfs(path: Path) -> bool:
    """Tell whether a path that is there lies on a tmpfs."""
    found = (ctypes.c_long * 32)()  # struct statfs begins with f_type and has 120 bytes
    return ctypes.CDLL(None).statfs(os.fsencode(path), found) == 0 and found[0] == _TMPFS_MAGIC


def _make(path: Path, size_bytes: int) -> Spare | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, size_bytes)
            return Spare(path, memoryview(mmap.mmap(file, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)))
        finally:
            os.close(file)
    except OSError:
        path.unlink(missing_ok=True)
        return None
