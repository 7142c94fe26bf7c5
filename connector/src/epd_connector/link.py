"""The local socket between an engine's scheduler and the worker that talks to the store.

Messages travel here and not in step metadata, because vLLM drops the metadata of an empty step: a lone
request that waits for its items would wait for ever. The socket keeps message boundaries and order
(SOCK_SEQPACKET) and lies in the engine's directory of mode 0700.
"""

import contextlib
import errno
import logging
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from .metadata import Location
from .metrics import Metrics

log = logging.getLogger(__name__)

SOCKET_NAME = "socket"
MAX_MESSAGE_BYTES = 64 << 10
MAX_ITEM_ID_CHARS = 4096
_MESSAGES_PER_POLL = 256


class Fetch(msgspec.Struct, tag=True, frozen=True):
    """Scheduler asks: fetch the item if it has ``rows`` embeddings."""

    item_id: str
    rows: int


class Confirm(msgspec.Struct, tag=True, frozen=True):
    """Scheduler asks: make sure the store has this item, which vLLM's own encoder cache holds."""

    item_id: str


class Release(msgspec.Struct, tag=True, frozen=True):
    """Scheduler says: the region is not needed any more once all ranks have finished the step."""

    offset: int
    after_step: int


class Counts(msgspec.Struct, tag=True, frozen=True):
    """Scheduler says: these are my counters so far."""

    sums: dict[str, float]


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Worker answers Fetch: there, and verified."""

    item_id: str
    location: Location


class Missing(msgspec.Struct, tag=True, frozen=True):
    """Worker answers Fetch: not to be had, for one of metrics.MISS_REASONS."""

    item_id: str
    reason: str


class Confirmed(msgspec.Struct, tag=True, frozen=True):
    """Worker answers Confirm: done, as far as it could be done."""

    item_id: str


Request = Fetch | Confirm | Release | Counts
Reply = Ready | Missing | Confirmed


class LinkClient:
    """The scheduler's end. Never blocks; a link that broke stays down, because then the engine is dying anyway."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / SOCKET_NAME)
        self._socket: socket.socket | None = None
        self._is_broken = False
        self._outbox: deque[bytes] = deque()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Reply)

    def connect(self) -> bool:
        """Tell whether the link is up, trying to connect when it never was."""
        if self._socket is None and not self._is_broken:
            candidate = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            candidate.setblocking(False)
            try:
                candidate.connect(self._path)
                self._socket = candidate
            except OSError:
                candidate.close()  # the worker is not listening yet
        return self._socket is not None

    def send(self, message: Request) -> None:
        """Send, or keep for the next poll when the worker is behind."""
        self._outbox.append(self._encoder.encode(message))
        self._flush()

    @property
    def is_up(self) -> bool:
        """Whether the link is connected now."""
        return self._socket is not None

    @property
    def is_behind(self) -> bool:
        """Whether messages wait here because the worker has not read earlier ones."""
        return bool(self._outbox)

    def poll(self) -> list[Reply]:
        """Return the replies that are there already."""
        self._flush()
        replies: list[Reply] = []
        while self._socket is not None and len(replies) < _MESSAGES_PER_POLL:
            try:
                data = self._socket.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                self._break(str(error))
                break
            if not data:
                self._break("closed by the worker")
                break
            replies.append(self._decoder.decode(data))
        return replies

    def wait(self, timeout_s: float) -> None:
        """Block until a reply is there, the link breaks, or the time is up."""
        if self._socket is None:
            return
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        poller.poll(timeout_s * 1000)

    def close(self) -> None:
        """Close for good."""
        self._is_broken = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _flush(self) -> None:
        while self._socket is not None and self._outbox:
            try:
                self._socket.send(self._outbox[0])
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENOBUFS):
                    self._break(str(error))
                return
            self._outbox.popleft()

    def _break(self, why: str) -> None:
        log.error("The link to the worker is down (%s): every item is encoded locally from now on.", why)
        self.close()


class CountsSender:
    """Sends the scheduler's counters to the worker that serves them, whenever they changed."""

    def __init__(self, link: LinkClient, metrics: Metrics) -> None:
        self._link = link
        self._metrics = metrics
        self._sent: dict[str, float] = {}

    def send(self) -> None:
        """Send all sums: one that is lost is made up for by the next."""
        sums = self._metrics.snapshot()
        if sums != self._sent and self._link.connect() and not self._link.is_behind:
            self._link.send(Counts(sums))
            self._sent = sums


class LinkServer:
    """The worker's end. Each of ``threads`` threads takes a message and handles it; ``reply`` may be called from any.

    So the next message is heard while one of them waits for it, and what one asks for costs a single wake-up.
    ``enter_thread`` is called first in each.
    """

    def __init__(
        self, directory: Path, handle: Callable[[Request], None], threads: int, enter_thread: Callable[[], None]
    ) -> None:
        self._handle = handle
        self._enter_thread = enter_thread
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SOCKET_NAME))
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self.threads = [
            threading.Thread(target=self._serve, name=f"epd-ec-link-{number}", daemon=True) for number in range(threads)
        ]
        self.threads[0].start()

    def reply(self, message: Reply) -> None:
        """Send to the scheduler; waits while it is behind, and forgets the message when it is gone."""
        with self._sending, contextlib.suppress(OSError):
            if self._connection is not None:
                self._connection.send(self._encoder.encode(message))

    def close(self) -> None:
        """Hear no more; ends each thread that does not hang in ``handle``, now or when that returns."""
        for end in (self._listener, self._connection):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        self._enter_thread()
        with contextlib.suppress(OSError):
            if self._connection is None:
                self._connection, _ = self._listener.accept()
                for thread in self.threads[1:]:
                    thread.start()
            decoder = msgspec.msgpack.Decoder(Request)
            while data := self._connection.recv(MAX_MESSAGE_BYTES):
                try:
                    self._handle(decoder.decode(data))
                except Exception:
                    log.exception("A message of the scheduler could not be handled.")
