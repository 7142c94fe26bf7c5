"""Several processes on one port: started, watched, started again, and told to stop."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any
from urllib.parse import urlsplit

from . import metrics
from .config import MetaserverConfig, ProxyConfig
from .loads import LoadRow, LoadTable

log = logging.getLogger(__name__)

# A worker that ends sooner than this after its start would be restarted over and over.
_EARLY_S = 5.0
_PAUSE_S = 1.0
_FAILED_TO_START = (1, 2)  # an address that is taken, a file that cannot be used
_STOPPING = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Shared:
    """What a worker has with the others: the loads, a file that ends when the parent does, and a folder.

    ``index`` is its own number among them; the worker 0 serves operators.
    """

    loads: LoadRow
    parent: int
    folder: str
    index: int


Serve = Callable[[ProxyConfig, Shared], int]


@dataclass(slots=True)
class _Worker:
    index: int
    process: BaseProcess
    started: float


def run_workers(config: ProxyConfig, serve: Serve) -> int:
    """Run ``serve`` in so many processes as are configured; return the exit code when all have ended."""
    with tempfile.TemporaryDirectory(prefix="epd-proxy-") as folder:
        return Supervisor(config, serve, folder).run()


class Supervisor:
    """The parent: it serves nothing and has no event loop, so that it can fork a worker at any time."""

    def __init__(self, config: ProxyConfig, serve: Serve, folder: str) -> None:
        self._config = config
        self._serve = serve
        self._folder = folder
        self._table = LoadTable(config.listen.workers)
        self._fork = multiprocessing.get_context("fork")
        self._workers: list[_Worker] = []
        self._stopping = False
        # Closed by the kernel when this process ends, however it ends; the workers read it.
        self._alive, self._alive_here = os.pipe()
        self._signals, self._signals_here = socket.socketpair()

    def run(self) -> int:
        """Run the workers until they are told to stop, or one cannot start. Returns the exit code."""
        with _ClaimedPort(self._config.listen.host, self._config.listen.port) as port:
            self._config = replace(self._config, listen=replace(self._config.listen, port=port))
            self._signals_here.setblocking(False)
            signal.set_wakeup_fd(self._signals_here.fileno())
            for number in _STOPPING:
                signal.signal(number, lambda _number, _frame: None)  # what came is read from the socket
            self._workers = [self._start(index) for index in range(self._config.listen.workers)]
            code = 0
            while self._workers:
                ready = wait([self._signals, *(worker.process.sentinel for worker in self._workers)])
                if self._signals in ready:
                    self._pass_on(self._signals.recv(64))
                for worker in [each for each in self._workers if each.process.sentinel in ready]:
                    code = self._bury(worker) or code
            return code

    def _pass_on(self, numbers: bytes) -> None:
        """The first signal lets the workers drain, the next one ends them, as without workers."""
        for number in numbers:
            if number in _STOPPING:
                log.info("%s: the workers are told to stop", signal.Signals(number).name)
                self._stop()

    def _stop(self) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.process.terminate()

    def _bury(self, worker: _Worker) -> int:
        """Forget a worker that ended, start another one in its place; return the exit code when there must be none."""
        worker.process.join()
        self._table.clear(worker.index)
        self._workers.remove(worker)
        code = worker.process.exitcode or 0
        if self._stopping:
            return max(0, code)
        if code in _FAILED_TO_START:
            self._stop()
            return code
        log.error("worker %d ended with code %d and is started again", worker.index, code)
        if time.monotonic() - worker.started < _EARLY_S:
            time.sleep(_PAUSE_S)
        self._workers.append(self._start(worker.index))
        return 0

    def _start(self, index: int) -> _Worker:
        # Until the child has its own handlers, a signal must wait: it would be lost in the parent's.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            process = self._fork.Process(target=self._run_worker, args=(index,), name=f"worker {index}")
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        return _Worker(index, process, time.monotonic())

    def _run_worker(self, index: int) -> None:
        os.setpgid(0, 0)  # a signal to the group (tini -g, Ctrl-C) comes once, from the parent
        os.close(self._alive_here)
        signal.set_wakeup_fd(-1)
        for number in _STOPPING:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        metrics.share(self._folder, index)
        config = replace(self._config, metaserver=_metaserver_of(self._config.metaserver, index))
        sys.exit(self._serve(config, Shared(LoadRow(self._table, index), self._alive, self._folder, index)))


class _ClaimedPort:
    """A port that is this proxy's alone, while it is in use: workers share it, another proxy must not."""

    def __init__(self, host: str, port: int) -> None:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self._family = found[0][0]
        self._address: Any = found[0][4]

    def __enter__(self) -> int:
        with self._bound(socket.SO_REUSEADDR) as alone:
            address = alone.getsockname()
        self._address = address
        try:
            self._socket = self._bound(socket.SO_REUSEPORT)
        except OSError:
            # Nobody listens there, or `alone` would have failed: it is the ended connections of a process that did not
            # share its port, and the kernel keeps these for a minute. With this option it looks past them, but another
            # proxy could claim the port too until the workers listen.
            self._socket = self._bound(socket.SO_REUSEPORT, socket.SO_REUSEADDR)
        return int(address[1])

    def __exit__(self, *_exc: object) -> None:
        self._socket.close()

    def _bound(self, *options: int) -> socket.socket:
        bound = socket.socket(self._family)
        try:
            for option in options:
                bound.setsockopt(socket.SOL_SOCKET, option, 1)
            bound.bind(self._address)
        except OSError as error:
            bound.close()
            raise OSError(error.errno, f"cannot listen at {self._address[0]} port {self._address[1]}: {error.strerror}"
                          ) from error  # fmt: skip
        return bound


def _metaserver_of(config: MetaserverConfig, index: int) -> MetaserverConfig:
    """Return where decode calls a worker back: each has the port after the one before it."""
    url = config.advertise_url
    if url:
        parts = urlsplit(url)
        port = (parts.port or (443 if parts.scheme == "https" else 80)) + index
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        url = f"{parts.scheme}://{host}:{port}"
    return replace(config, port=config.port + index, advertise_url=url)
