"""One HTTP/1.1 connection to a backend, one exchange at a time."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from ..errors import BackendDisconnectError, BackendError, BackendProtocolError, BackendTimeoutError

# A backend that sends more before its answer begins is broken; uvicorn and nginx take 64 KiB at the most.
_HEAD_MAX_BYTES = 128 * 1024
# What is kept for a reader that does not come; then the backend has to wait.
_HELD_MAX_BYTES = 256 * 1024
# A larger body is written piece by piece, as the backend takes it: it may answer before it has seen all.
_PIECE_BYTES = 256 * 1024
# A smaller one is copied to its head, and one buffer written.
_JOINED_BYTES = 16 * 1024
_CONTENT_TYPE_LENGTH = len("content-type")
# In every answer, as nginx and uvicorn write them, and replaced by ours before the client sees it.
_OF_NO_USE = frozenset((b"Date", b"date", b"Server", b"server"))

RawHeaders = list[tuple[bytes, bytes]]
"""Names and values as they came: most are never looked at."""


class Connection(asyncio.Protocol):
    """Asks, and gives the answer's bytes as they come.

    ``complete``: the answer is all here. ``answered``: at least one byte of it came. ``keepable``: the next exchange
    may use the connection. ``registry`` holds those that were used and are open.
    """

    __deletable__ = ("_parser",)  # compiled classes let go of no other attribute

    def __init__(self, backend: str, registry: "set[Connection]") -> None:
        self.backend = backend
        self.status = 0
        self.headers: RawHeaders = []
        self.content_type = ""
        self.answered = False
        self.complete = True
        self.kept_since = 0.0
        self._keep_alive = False
        self._loop = asyncio.get_running_loop()
        self._registry = registry
        self._parser = HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._head: RawHeaders = []
        self._head_bytes = 0
        self._headed = False
        self._interim = False
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._reading_paused = False
        self._writing_paused = False
        self._cut_short = False
        self._write: Callable[[bytes], bool] | None = None
        self._full = False
        # Made when it is raised: the traceback of one that is kept would hold this, and the request's body.
        self._fault: Callable[[], BackendError] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf
        self._pause_s = 0.0

    def __repr__(self) -> str:
        state = "closed" if self._transport is None else "idle" if self.complete else "asking"
        return f"<Connection {self.backend} {state} held={self._held_bytes} bytes>"

    @property
    def keepable(self) -> bool:
        """Whether it is open, with nothing of an exchange left on it."""
        transport = self._transport
        return (
            self.complete
            and not self._pieces  # nobody took them, and the next exchange's answer would begin with them
            and self._keep_alive
            and not self._cut_short
            and transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
        )

    # What the client does with it.

    async def ask(self, head: bytes, body: bytes | None, until: float) -> None:
        """Send a request and wait for the first bytes of its answer ``until`` then, by the loop's clock.

        Raises :class:`BackendError`. However it fails, the connection is closed.
        """
        self.answered = self.complete = self._headed = self._keep_alive = False
        self._head_bytes = 0
        if self._transport is None:
            raise self._disconnected()
        self._registry.add(self)  # not sooner: uvloop tells nobody when a cancelled connect closes what it had made
        self._limit(until)
        try:
            if body is None:
                self._transport.write(head)
            elif len(body) <= _JOINED_BYTES:
                self._transport.write(head + body)
            elif len(body) <= _PIECE_BYTES:
                self._transport.writelines((head, body))
            else:
                self._transport.write(head)
                await self._send_pieces(memoryview(body))
            while not self._pieces and not self.complete:
                if self._fault:
                    raise self._fault()
                self._waiter = self._loop.create_future()
                await self._waiter
        except BaseException:
            self.abort()
            raise
        finally:
            self._waiter = None
            self._deadline = math.inf

    async def read(self, pause_s: float) -> bytes:
        """Return what has come, at the end nothing; wait up to ``pause_s`` for it. Raises :class:`BackendError`."""
        if not self._pieces and not self.complete:
            self._limit(self._loop.time() + pause_s)
            try:
                while not self._pieces and not self.complete:
                    await self._wait()
            finally:
                self._deadline = math.inf
        return self.take()

    def take(self) -> bytes:
        """Return what has come and was not taken yet."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces, self._held_bytes = [], 0
        if self._reading_paused:
            self._resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pump(self, write: Callable[[bytes], bool], drained: Callable[[], Awaitable[None]],
                   pause_s: float) -> bytes:  # fmt: skip
        """Have ``write`` called with all that comes, as it comes, and return what comes together with the end.

        Raises :class:`BackendError`.

        ``write`` returns False when that was enough for now; then nothing is read until ``drained`` returns. It is
        called from within the event loop's reading, which saves a task's turn for each piece, and must not raise.
        The backend may pause for ``pause_s`` at the most.
        """
        self._write, self._full = write, False
        self._pause_s = pause_s
        try:
            while True:
                self._push()
                if self._full:
                    self._deadline = math.inf
                    await drained()
                    self._full = False
                elif self.complete:
                    return self.take()
                else:
                    self._resume_reading()
                    self._limit(self._loop.time() + pause_s)
                    await self._wait()
        finally:
            self._write = None
            self._deadline = math.inf

    def abort(self) -> None:
        """Close at once; what is under way is aborted at the backend. Closing twice is harmless."""
        if self._transport:
            self._transport.abort()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of another class

    def data_received(self, data: bytes) -> None:
        """Parse what came and hand it on."""
        if self.complete:  # nobody asked
            self.abort()
            return
        self.answered = True
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade):
            self._keep_alive = False
            if not self.complete:  # else what follows a whole answer belongs to nothing
                self._fail(BackendProtocolError, "the instance's answer is not valid HTTP")
        if not self._headed:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_MAX_BYTES:
                self._fail(BackendProtocolError, "the head of the instance's answer is too large")
        if self._write is None:
            if self._held_bytes > _HELD_MAX_BYTES:
                self._pause_reading()
            self._wake()
        else:
            if not self._full:
                self._deadline = self._loop.time() + self._pause_s
            self._push()
            if self._full or self.complete:
                self._wake()

    def pause_writing(self) -> None:
        """The backend does not take its request as fast as it is written."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """It does again."""
        self._writing_paused = False
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is under way."""
        self._transport = None
        del self._parser  # which holds this
        if self._timer:
            self._timer.cancel()
        if not self.complete and self._fault is None:
            if exc is None and self._headed and _ends_with_connection(self.headers):
                self.complete = True
            else:
                self._fault = self._disconnected
        self._wake()
        self._registry.discard(self)

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer begins, or one that nobody asked for."""
        if self.complete:
            raise ValueError("an answer that was not asked for")
        self._head, self.content_type = [], ""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; trailers are dropped."""
        if self._headed or name in _OF_NO_USE:
            return
        self._head.append((name, value))
        if len(name) == _CONTENT_TYPE_LENGTH and name.lower() == b"content-type":
            self.content_type = value.decode("utf-8", "surrogateescape")

    def on_headers_complete(self) -> None:
        """Note the head, unless it is an interim one (1xx), which leads to nothing here."""
        status = self._parser.get_status_code()
        if status == 101:
            raise ValueError("the protocol is not to be changed")
        self._interim = status < 200
        if not self._interim:
            self.status = status
            self.headers = self._head
            self._headed = True

    def on_body(self, data: bytes) -> None:
        """Keep a piece."""
        self._pieces.append(data)
        self._held_bytes += len(data)

    def on_message_complete(self) -> None:
        """Note the end."""
        if not self._interim:
            self.complete = True
            self._keep_alive = self._parser.should_keep_alive()

    # Inside.

    async def _send_pieces(self, body: memoryview) -> None:
        for start in range(0, len(body), _PIECE_BYTES):
            while self._writing_paused and not self._headed:
                await self._wait()
            if self._headed or self._transport is None:  # the answer is here already, or nothing more can be sent
                self._cut_short = True
                return
            self._transport.write(body[start : start + _PIECE_BYTES])

    def _push(self) -> None:
        if self._pieces and not self._full and not self.complete and self._write:
            self._full = not self._write(self.take())
            if self._full:
                self._pause_reading()

    async def _wait(self) -> None:
        """Return at the next change. Raises what went wrong."""
        if self._fault:
            raise self._fault()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _limit(self, deadline: float) -> None:
        """Have the exchange fail at ``deadline``, unless that is changed before.

        A timer is not stopped when its exchange is over, but goes on for the next one: to start one for each request
        would take longer than to read its answer.
        """
        self._deadline = deadline
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._expire)
        elif deadline < self._timer.when():
            self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._loop.time() >= self._deadline:
            self._fail(BackendTimeoutError, "the instance did not answer in time")
        elif self._deadline < math.inf:  # it was put off meanwhile
            self._timer = self._loop.call_at(self._deadline, self._expire)

    def _fail(self, fault: type[BackendError], message: str) -> None:
        self._fault = self._fault or partial(fault, self.backend, message)
        self.abort()
        self._wake()

    def _disconnected(self) -> BackendError:
        message = "the instance's connection broke before its answer was complete"
        return BackendDisconnectError(self.backend, message)

    def _pause_reading(self) -> None:
        if self._transport and not self._reading_paused and not self._transport.is_closing():
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            if self._transport and not self._transport.is_closing():
                self._transport.resume_reading()


def _ends_with_connection(headers: RawHeaders) -> bool:
    """Whether a body without length ends where the connection does (RFC 9112, 6.3)."""
    found = {name.lower(): value for name, value in headers}
    coding = found.get(b"transfer-encoding")
    return not coding.lower().endswith(b"chunked") if coding else b"content-length" not in found
