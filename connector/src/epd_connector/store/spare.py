"""A file that has its pages before there is anything to write into them.

On a tmpfs, getting pages costs more than filling them: to write 8 MiB took 4.7 ms into a new file and 1.5 ms into one
whose pages were there. So after each put another thread readies a file for the next one. Not at once: while it does,
the kernel is busy with pages, and a consumer that waits for the object gets it 2 ms later on two cores.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

DELAY_S = 0.02


class SpareFile:
    """At most one file in reserve; ``name`` gives a new path in its folder. Its user keeps threads apart.

    Others may remove the file at any time. Where the file system cannot allocate, there never is one.
    """

    def __init__(self, name: Callable[[], Path]) -> None:
        self._name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="epd-ec-spare")
        self._making: Future[Path | None] | None = None
        self._called_off = threading.Event()
        self._size_bytes = 0
        self.is_wanted = True
        """Whether there is no file, nor one in the making."""

    def make(self, size_bytes: int) -> None:
        """Begin to ready a file of this size."""
        self.is_wanted, self._size_bytes = False, size_bytes
        self._called_off = threading.Event()
        self._making = self._thread.submit(_make_after, DELAY_S, self._called_off, self._name(), size_bytes)

    def take(self) -> tuple[Path | None, int]:
        """Hand the file over, with its size in bytes, if there is one."""
        if self._making is None or not self._making.done():
            return None, 0
        path, size_bytes, self._making = self._making.result(), self._size_bytes, None
        self.is_wanted = path is not None
        return path, size_bytes

    def settle(self) -> None:
        """Wait for the file in the making; one that was not begun is called off."""
        self._called_off.set()
        if self._making is not None:
            try:
                self._making.result()
            except CancelledError:
                self._making, self.is_wanted = None, True

    def discard(self) -> bool:
        """Remove the file; return whether there was one."""
        self.settle()
        path, _ = self.take()
        if path is None:
            return False
        path.unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Remove the file, and make no other."""
        self.discard()
        self.is_wanted = False
        self._thread.shutdown()


def _make_after(delay_s: float, called_off: threading.Event, path: Path, size_bytes: int) -> Path | None:
    if called_off.wait(delay_s):
        raise CancelledError
    return _make(path, size_bytes)


def _make(path: Path, size_bytes: int) -> Path | None:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            is_ready = _allocate(file, size_bytes)
        finally:
            os.close(file)
        if not is_ready:
            path.unlink()
    except OSError:
        return None
    return path if is_ready else None


def _allocate(file: int, size_bytes: int) -> bool:
    # Not os.posix_fallocate: where the file system has no fallocate, as NFS 3, that writes every block instead.
    return bool(ctypes.CDLL(None).fallocate(file, 0, ctypes.c_long(0), ctypes.c_long(size_bytes)) == 0)
