"""One client's connection: requests come, each is handled by a task, answers leave in the requests' order."""

import asyncio
import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from ..errors import InvalidRequestError
from .request import Request
from .response import Headers, Response
from .stream import Stream

if TYPE_CHECKING:
    from .listener import Listener

log = logging.getLogger(__name__)

_HEAD_MAX_BYTES = 64 * 1024
_HEADERS_MAX = 256
_NO_CONTENT = 204  # and no length either (RFC 9110, 8.6)
# Behind the one that is answered. No browser sends requests so, and what is read at once is 256 KiB at the most.
_PIPELINED_MAX = 64


class ClientConnection(asyncio.Protocol):
    """Reads and answers. ``deadline`` (the loop's time) is when it is closed unless something happens before.

    ``full``: the client does not take its answer as fast as it is written. ``reading_paused``: it has to wait itself.
    """

    def __init__(self, listener: "Listener") -> None:
        self.deadline = math.inf
        self.remote = ""
        self._listener = listener
        self._loop = listener.loop
        self.transport: asyncio.Transport | None = None
        self._parser = HttpRequestParser(self)
        self._target = b""
        self._headers: list[tuple[str, str]] = []
        self._head_bytes = 0
        self._within_head = False
        self._coming: Request | None = None  # of which the body is on its way
        self._answering: Request | None = None
        self._bodiless: Request | None = None  # of which the parser leaves out the body
        self._resumed: Request | None = None
        self._waiting: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._begun = False  # something of the answer was written
        self._last = False  # the connection closes after this answer
        self._lingering = False
        self.reading_paused = False
        self.full = False
        self._drained: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "closed" if self.transport is None else "busy" if self._answering else "idle"
        return f"<ClientConnection {self.remote} {state}>"

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self.transport is None or self.transport.is_closing()

    @property
    def idle(self) -> bool:
        """Whether nothing of a request is here."""
        return self._answering is None and not self._within_head

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are of another class
        peer = transport.get_extra_info("peername")
        self.remote = str(peer[0]) if isinstance(peer, tuple) else ""
        self.deadline = self._loop.time() + self._listener.waits.head_s
        self._listener.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Parse what came; a whole head starts its handler."""
        if self._last and self._coming is None:
            return  # of a further request, which is not answered
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._read_on(data[upgrade.args[0] :])
        except HttpParserError as error:
            self._refuse(400, f"the request is not valid HTTP: {error}")
        else:
            if self._within_head:
                self._head_bytes += len(data)
                if self._head_bytes > _HEAD_MAX_BYTES:
                    self._refuse(431, "the request's head is too large")

    def pause_writing(self) -> None:
        """See ``full``."""
        self.full = True

    def resume_writing(self) -> None:
        """It does again."""
        self.full = False
        if self._drained and not self._drained.done():
            self._drained.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the interface is asyncio's
        """End what is under way: nobody waits for it."""
        self.transport = None
        del self._parser  # which holds this
        self._listener.connections.discard(self)
        self._waiting.clear()
        if self._task:
            self._task.cancel()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._resumed:
            return
        if self._last or len(self._waiting) >= _PIPELINED_MAX:
            raise ValueError("a request too many")
        self._target, self._headers, self._head_bytes, self._within_head = b"", [], 0, True
        if self._answering is None:
            self.deadline = self._loop.time() + self._listener.waits.head_s

    def on_url(self, part: bytes) -> None:
        """Note the target, which comes in parts where it is long."""
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; trailers are dropped."""
        if self._within_head:
            self._headers.append((name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")))

    def on_headers_complete(self) -> None:
        """Have the request handled, now or after those before it."""
        if self._resumed:
            self._coming, self._resumed = self._resumed, None
            return
        if len(self._headers) > _HEADERS_MAX:
            raise ValueError("too many headers")
        parser = self._parser
        self._within_head = False
        self._coming = request = Request(
            self, parser.get_method().decode(), self._target.decode("ascii", "replace"), self._headers,
            version=parser.get_http_version(), keep_alive=parser.should_keep_alive(),
        )  # fmt: skip
        if parser.should_upgrade():
            self._note_upgrade(request)
        if self._answering is None:
            self._begin(request)
        else:
            self._waiting.append(request)
            self._pause_reading()

    def on_body(self, piece: bytes) -> None:
        """Give a piece to the request."""
        if self._coming and not self._lingering and not self._coming.add(piece):
            self._pause_reading()

    def on_message_complete(self) -> None:
        """The request is all here."""
        if self._coming:
            self._coming.end()
            self._coming = None
        if self._lingering:
            self.close_after_write()

    # What requests and streams do with it.

    def transport_info(self, name: str) -> Any:
        """Return what the transport knows."""
        return self.transport.get_extra_info(name) if self.transport else None

    def resume_reading(self) -> None:
        """There is room again, unless other requests wait here already."""
        if self.reading_paused and not self._waiting:
            self.reading_paused = False
            if self.transport and not self.transport.is_closing():
                self.transport.resume_reading()

    def begin_stream(self, request: Request, status: int, headers: Headers, length: int | None) -> Stream:
        """Write a head; the body follows."""
        chunked = length is None and request.version == "1.1"
        framing = "Transfer-Encoding: chunked\r\n" if chunked else ""
        if length is not None:
            framing = f"Content-Length: {length}\r\n"
        elif not chunked:
            self._last = True
        self._begun = True
        self.write(self._listener.write_head(request, status, headers, framing + self._persistence(request)))
        return Stream(self, chunked=chunked)

    def write(self, data: bytes) -> None:
        """Write, unless the client is gone."""
        if self.transport:
            self.transport.write(data)

    async def drained(self, idle_s: float) -> None:
        """See :meth:`Stream.drained`."""
        await asyncio.sleep(0)  # uvloop writes at the end of a turn
        if self.closed:
            raise ConnectionResetError("the client left")
        if not self.full:
            return
        self._drained = self._loop.create_future()
        try:
            async with asyncio.timeout(idle_s):
                await self._drained
        except TimeoutError as error:
            self.abort()
            raise ConnectionResetError(f"the client took nothing of its answer for {idle_s:g} s") from error
        finally:
            self._drained = None

    def close_after_write(self) -> None:
        """Close when the client has taken what was written, or some time later."""
        self._last = True
        if self.transport:
            self.deadline = self._loop.time() + self._listener.waits.linger_s
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self.transport:
            self.transport.abort()

    def close_idle(self) -> None:
        """Close if it is idle, else after the answer."""
        if self.idle:
            self.close_after_write()
        else:
            self._last = True

    # Inside.

    def _begin(self, request: Request) -> None:
        self.deadline = math.inf
        self._answering = request
        self._begun = False
        self._task = self._loop.create_task(self._answer(request))

    async def _answer(self, request: Request) -> None:
        try:
            response = await self._listener.handle(request)
            if response:
                self._write_whole(request, response)
        except asyncio.CancelledError:
            if not self.closed:  # else what was written may still go out
                self.abort()
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            self._refuse(500, "the proxy failed to serve the request")
        finally:
            self._task = None
        self._go_on(request)

    def _write_whole(self, request: Request, response: Response) -> None:
        body, status = response.body, response.status
        framing = self._persistence(request)
        if status != _NO_CONTENT:
            framing = f"Content-Length: {len(body)}\r\n{framing}"
        head = self._listener.write_head(request, status, response.headers, framing)
        self._begun = True
        self.write(head if request.method == "HEAD" else head + body)

    def _persistence(self, request: Request) -> str:
        """Decide whether the connection goes on after this answer, and return the header that says so."""
        self._last = self._last or not request.keep_alive or not request.complete or self._listener.draining
        if self._last:
            return "Connection: close\r\n"
        return "" if request.version == "1.1" else "Connection: keep-alive\r\n"

    def _go_on(self, request: Request) -> None:
        """After an answer: the next request, or the end."""
        self._answering = None
        if self.transport is None:
            return
        if self._last or self._listener.draining:
            if request.complete:
                self.close_after_write()
            else:
                self._linger()
        elif self._waiting:
            self._begin(self._waiting.popleft())
            self.resume_reading()
        else:
            self.deadline = self._loop.time() + (
                self._listener.waits.head_s if self._within_head else self._listener.waits.idle_s
            )

    def _linger(self) -> None:
        """Drop what still comes: a close in its midst would have the client's system drop our answer."""
        self._lingering = True
        self.deadline = self._loop.time() + self._listener.waits.linger_s
        if self.transport and self.transport.can_write_eof():
            self.transport.write_eof()
        self.resume_reading()

    def _refuse(self, status: int, why: str) -> None:
        """Tell why nothing more is answered here, unless an answer is under way, and close."""
        self._last = True
        self._within_head = False
        if self._coming:
            self._coming.fail(InvalidRequestError(why))
            self._coming = None
        if self._begun or (self._answering and status < 500):
            return  # to be told by its handler, or by the answer's end
        if self.transport:
            response = self._listener.refuse(status, why)
            framing = f"Content-Length: {len(response.body)}\r\nConnection: close\r\n"
            self.write(self._listener.write_head(None, status, response.headers, framing) + response.body)
            self._linger()

    def _note_upgrade(self, request: Request) -> None:
        if request.method == "CONNECT":
            self._last = True
        elif request.content_length or "transfer-encoding" in request.headers:
            self._bodiless, self._coming = request, None

    def _read_on(self, rest: bytes) -> None:
        """Read ``rest`` as what it is: another protocol was offered, but none is spoken here (RFC 9110, 7.8).

        httptools takes even the body for a part of that; Java's client offers HTTP/2 with every request.
        """
        self._parser = HttpRequestParser(self)
        request, self._bodiless = self._bodiless, None
        if request:
            self._resumed = request
            name = "transfer-encoding" if "transfer-encoding" in request.headers else "content-length"
            rest = f"POST / HTTP/1.1\r\n{name}: {request.headers[name]}\r\n\r\n".encode() + rest
        if rest:
            self.data_received(rest)

    def _pause_reading(self) -> None:
        if self.transport and not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()
