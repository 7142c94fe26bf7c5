"""What a handler gets: a request's head, its body as it comes, and the way to answer with a stream."""

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from ..errors import BodyTooLargeError, BodyTooSlowError, InvalidRequestError
from .response import Headers
from .stream import Stream

if TYPE_CHECKING:
    from .connection import ClientConnection

# What is kept for a handler that does not take it; then the client has to wait. Most bodies with a picture fit.
HELD_MAX_BYTES = 512 * 1024


class Request:
    """One request of a client.

    ``target`` is the path as it came, with its query; ``path`` is decoded, without it; ``route`` is how the handler's
    path was registered. ``header_lines`` are the headers as they came, ``headers`` has the first of each name, in lower
    case. ``complete``: all of the body is here.
    """

    __slots__ = ("_awaits_continue", "_connection", "_fault", "_held_bytes", "_least_bytes", "_pieces", "_waiter",
                 "complete", "content_length", "header_lines", "headers", "keep_alive", "method", "path", "route",
                 "target", "version")  # fmt: skip

    def __init__(self, connection: "ClientConnection", method: str, target: str, lines: Headers, *,
                 version: str, keep_alive: bool) -> None:  # fmt: skip
        self.method = method
        if not target.startswith("/"):
            target = _origin_form(target)
        self.target = target
        self.path = target if "%" not in target and "?" not in target else unquote(target.partition("?")[0])
        self.header_lines = lines
        self.headers = headers = {name.lower(): value for name, value in reversed(lines)}
        self.version = version
        self.keep_alive = keep_alive
        self.route = "other"
        self.complete = False
        length = headers.get("content-length")
        self.content_length = int(length) if length else 0  # the parser has checked that it is a number
        self._connection = connection
        self._awaits_continue = "expect" in headers and headers["expect"].lower() == "100-continue"
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._least_bytes = 1
        self._waiter: asyncio.Future[None] | None = None
        self._fault: InvalidRequestError | None = None

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.target} {'complete' if self.complete else 'coming'}>"

    @property
    def query(self) -> dict[str, str]:
        """The query's fields, of several with one name the last."""
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def remote(self) -> str:
        """The client's address, empty where there is none."""
        return self._connection.remote

    def transport_info(self, name: str) -> Any:
        """Return what the transport knows under ``name``, as ``peercert``."""
        return self._connection.transport_info(name)

    def take(self) -> bytes:
        """Return what has come of the body and was not taken yet."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces, self._held_bytes = [], 0
        if self._connection.reading_paused:
            self._connection.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def more(self, least_bytes: int = 1) -> bytes:
        """Wait for more of the body and return it, at its end nothing. Raises :class:`InvalidRequestError`.

        Less than ``least_bytes`` is returned at the end only, since to be woken for each piece takes time; they are
        :data:`HELD_MAX_BYTES` at most. A client that asked to be told so is now told to send it.
        """
        self._least_bytes = least_bytes
        while self._held_bytes < least_bytes and not self.complete:
            if self._fault:
                raise self._fault
            if self._awaits_continue:
                self._awaits_continue = False
                self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self.take()

    async def read(self, size_max_bytes: int, limit_s: float) -> bytes:
        """Return the whole body, which has to be here within ``limit_s``.

        Raises :class:`BodyTooLargeError`, :class:`BodyTooSlowError`, or :class:`InvalidRequestError` for a broken one.
        """
        body = b""
        try:
            async with asyncio.timeout(limit_s):
                while self.content_length <= size_max_bytes and len(body) <= size_max_bytes:
                    if not (piece := await self.more()):
                        return body
                    body += piece
        except TimeoutError as error:
            raise BodyTooSlowError(f"the body did not come within {limit_s:g} s") from error
        raise BodyTooLargeError(f"the body is over {size_max_bytes} bytes, the most that is taken")

    def stream(self, status: int, headers: Headers, length: int | None = None) -> Stream:
        """Begin an answer that is written piece by piece, of ``length`` bytes where that is known. Not for HEAD."""
        return self._connection.begin_stream(self, status, headers, length)

    def cancel(self) -> None:
        """End its handler."""
        self._connection.cancel(self)

    # What the connection does.

    def add(self, piece: bytes) -> bool:
        """Take in a piece of the body; returns False when that is enough for now."""
        self._pieces.append(piece)
        self._held_bytes += len(piece)
        self._awaits_continue = False
        if self._waiter and self._held_bytes >= self._least_bytes:
            self.wake()
        return self._held_bytes < HELD_MAX_BYTES

    def end(self) -> None:
        """The body is all here."""
        self.complete = True
        if self._waiter:
            self.wake()

    def fail(self, fault: InvalidRequestError) -> None:
        """The rest of the body will not come."""
        self._fault = fault
        self.wake()

    def wake(self) -> None:
        """Something has changed."""
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)


def _origin_form(target: str) -> str:
    """Return a target without scheme and authority (RFC 9112, 3.2.2); one of another form as it is."""
    scheme, _, rest = target.partition("://")
    return "/" + rest.partition("/")[2] if scheme.lower() in ("http", "https") else target
