"""What all workers have at each instance, in memory that they share: each writes its own row, all read the sums."""

import fcntl
import mmap
import os
from hashlib import blake2b

# Instances that ever were, all stages together; one beyond it is balanced by what its own worker knows.
_COLUMNS = 1024
_CELL = 2  # requests, tokens
_WORD_BYTES = 8


class LoadTable:
    """Made before the workers are forked. The first row names the columns, each further one belongs to a worker."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._file = os.memfd_create("epd-proxy-loads")
        size_bytes = (_COLUMNS + workers * _COLUMNS * _CELL) * _WORD_BYTES
        os.ftruncate(self._file, size_bytes)
        self._words = memoryview(mmap.mmap(self._file, size_bytes)).cast("q")

    def clear(self, worker: int) -> None:
        """Forget the row of a worker that is gone."""
        start = self._cell(worker, 0)
        for at in range(start, start + _COLUMNS * _CELL):
            self._words[at] = 0

    def column(self, stage: str, url: str) -> int | None:
        """Return the column of an instance, the same one in every worker; None when all are taken.

        A lock that the kernel gives back when its holder dies keeps two workers from taking one column.
        """
        name = int.from_bytes(blake2b(f"{stage} {url}".encode(), digest_size=8).digest(), "big", signed=True) or 1
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            for column in range(_COLUMNS):
                if self._words[column] in (0, name):
                    self._words[column] = name
                    return column
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)
        return None

    def add(self, worker: int, column: int, requests: int, tokens: int) -> None:
        """Add to a cell of the worker's own row."""
        at = self._cell(worker, column)
        self._words[at] += requests
        self._words[at + 1] += tokens

    def total(self, column: int) -> tuple[int, int]:
        """Return the requests and tokens that all workers together have at an instance."""
        cells = range(_COLUMNS + column * _CELL, len(self._words), _COLUMNS * _CELL)
        words = self._words
        return sum([words[at] for at in cells]), sum([words[at + 1] for at in cells])

    def _cell(self, worker: int, column: int) -> int:
        return _COLUMNS + (worker * _COLUMNS + column) * _CELL


class LoadRow:
    """One worker's view of the table."""

    def __init__(self, table: LoadTable, worker: int) -> None:
        self._table = table
        self._worker = worker

    def open(self, stage: str, url: str) -> "Load":
        """Return the load of an instance; where there is no place left in the table, this worker's share of it."""
        column = self._table.column(stage, url)
        return Load() if column is None else SharedLoad(self._table, self._worker, column)


class Load:
    """What one instance has to do."""

    def __init__(self) -> None:
        self._requests = 0
        self._tokens = 0

    @property
    def requests(self) -> int:
        """Number of requests now there."""
        return self._requests

    @property
    def tokens(self) -> int:
        """Estimated tokens of these requests."""
        return self._tokens

    def add(self, requests: int, tokens: int) -> None:
        """Add to it; less than nothing takes away."""
        self._requests += requests
        self._tokens += tokens


class SharedLoad(Load):
    """The same, told to all workers and with what they have there."""

    def __init__(self, table: LoadTable, worker: int, column: int) -> None:
        super().__init__()
        self._table = table
        self._worker = worker
        self._column = column

    @property
    def requests(self) -> int:
        """See :class:`Load`."""
        return self._table.total(self._column)[0]

    @property
    def tokens(self) -> int:
        """See :class:`Load`."""
        return self._table.total(self._column)[1]

    def add(self, requests: int, tokens: int) -> None:
        """See :class:`Load`."""
        self._table.add(self._worker, self._column, requests, tokens)
