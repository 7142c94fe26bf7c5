"""One client's connection: requests come, each is handled by a task, answers leave in the requests' order."""

import asyncio
import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from ..errors import InvalidRequestError
from .reading import RequestReader
from .request import Request
from .response import Headers, Response
from .stream import Stream

if TYPE_CHECKING:
    from .listener import Listener

log = logging.getLogger(__name__)

_NO_CONTENT = 204  # and no length either (RFC 9110, 8.6)
# Behind the one that is answered. No browser sends requests so, and what is read at once is 256 KiB at the most.
_PIPELINED_MAX = 64


class ClientConnection(RequestReader):
    """Reads and answers. ``deadline`` (the loop's time) is when it is closed unless something happens before.

    ``full``: the client does not take its answer as fast as it is written.
    """

    def __init__(self, listener: "Listener") -> None:
        super().__init__()
        self.deadline = math.inf
        self.remote = ""
        self.full = False
        self._listener = listener
        self._loop = listener.loop
        self._answering: Request | None = None
        self._waiting: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._wanted: asyncio.Future[None] | None = None  # by the task, which has nothing to do
        self._begun = False  # an answer was, and no other one can be told
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
            self._task = None  # which would hold this, and what was under way, until garbage is looked for

    # What the reading half calls.

    def begin_head(self) -> None:
        """See :class:`RequestReader`."""
        if self.last or len(self._waiting) >= _PIPELINED_MAX:
            raise ValueError("a request too many")
        if self._answering is None:
            self.deadline = self._loop.time() + self._listener.waits.head_s

    def take_in(self, request: Request) -> None:
        """Have the request handled, now or after those before it."""
        if self._answering is None:
            self._begin(request)
        else:
            self._waiting.append(request)
            self.pause_reading()

    def resume_reading(self) -> None:
        """There is room again, unless other requests wait here already."""
        if not self._waiting:
            super().resume_reading()

    def refuse(self, status: int, why: str) -> None:
        """Tell why nothing more is answered here, unless an answer is under way, and close."""
        if self.lingering:
            self.close_after_write()
            return
        self.last = True
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

    def end_lingering(self) -> None:
        """See :class:`RequestReader`."""
        self.close_after_write()

    # What requests and streams do with it.

    def transport_info(self, name: str) -> Any:
        """Return what the transport knows."""
        return self.transport.get_extra_info(name) if self.transport else None

    def begin_stream(self, request: Request, status: int, headers: Headers, length: int | None) -> Stream:
        """Begin an answer; its head leaves with the first piece of its body."""
        chunked = length is None and request.version == "1.1"
        framing = "Transfer-Encoding: chunked\r\n" if chunked else ""
        if length is not None:
            framing = f"Content-Length: {length}\r\n"
        elif not chunked:
            self.last = True
        self._begun = True
        head = self._listener.write_head(request, status, headers, framing + self._persistence(request))
        return Stream(self, head, chunked=chunked)

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
            raise ConnectionResetError(f"the client took too little of its answer within {idle_s:g} s") from error
        finally:
            self._drained = None

    def close_after_write(self) -> None:
        """Close when the client has taken what was written, or some time later."""
        self.last = True
        if self.transport:
            self.deadline = self._loop.time() + self._listener.waits.linger_s
            self.transport.close()

    def cancel(self, request: Request) -> None:
        """End the handler of ``request``, if it is the one under way."""
        if self._task and self._answering is request:
            self._task.cancel()

    def abort(self) -> None:
        """Close at once."""
        if self.transport:
            self.transport.abort()

    def close_idle(self) -> None:
        """Close if it is idle, else after the answer."""
        if self.idle:
            self.close_after_write()
        else:
            self.last = True

    # Inside.

    def _begin(self, request: Request) -> None:
        self.deadline = math.inf
        self._answering = request
        self._begun = False
        if self._task is None:
            self._task = self._loop.create_task(self._answer_all(), name=f"client {self.remote}")
        elif self._wanted:
            self._wanted.set_result(None)
            self._wanted = None

    async def _answer_all(self) -> None:
        """Answer one request after the other. To wake a task takes half the time of making one for each request.

        It ends after an answer that is the last: to cancel it when the connection is lost takes 25 µs, 8 % of a request
        over a connection of its own.
        """
        while not (self.last and self._answering is None):
            request = self._answering
            if request is None:
                self._wanted = self._loop.create_future()
                await self._wanted
                continue
            try:
                response = await self._listener.handle(request)
                if response:
                    self._write_whole(request, response)
                    if self.full:  # the next answer would be kept for it too
                        await self.drained(self._listener.waits.linger_s)
            except ConnectionError:  # it took too little, or left
                return
            except asyncio.CancelledError:
                if not self.closed:  # else what was written may still go out
                    self.abort()
                raise
            except Exception:
                log.exception("%s %s failed", request.method, request.path)
                self.refuse(500, "the proxy failed to serve the request")
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
        self.last = self.last or not request.keep_alive or not request.complete or self._listener.draining
        if self.last:
            return "Connection: close\r\n"
        return "" if request.version == "1.1" else "Connection: keep-alive\r\n"

    def _go_on(self, request: Request) -> None:
        """After an answer: the next request, or the end."""
        self._answering = None
        self._begun = False
        if self.transport is None:
            return
        if self.last or self._listener.draining:
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
            self.resume_reading()  # of a large body that its handler did not read

    def _linger(self) -> None:
        """Drop what still comes: a close in its midst would have the client's system drop our answer."""
        self.lingering = True
        self.deadline = self._loop.time() + self._listener.waits.linger_s
        if self.transport and self.transport.can_write_eof():
            self.transport.write_eof()
        self.resume_reading()
