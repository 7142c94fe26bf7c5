"""A backend's answer, on the connection it comes over."""

import asyncio
from collections.abc import Awaitable, Callable

from ..errors import BackendProtocolError
from .connection import Connection


class UpstreamResponse:
    """A backend's answer of which head and first bytes are here. Whoever holds it closes it."""

    __slots__ = (
        "_connection",
        "_idle_s",
        "_release",
        "_until",
        "backend",
        "content_type",
        "first",
        "headers",
        "status",
    )

    def __init__(self, connection: Connection, idle_s: float, until: float, release: Callable[[Connection], None]
                 ) -> None:  # fmt: skip
        self.backend = connection.backend
        self.status = connection.status
        self.headers = connection.headers
        self.content_type = connection.content_type
        self.first = connection.take()
        self._connection: Connection | None = connection
        self._idle_s = idle_s
        self._until = until
        self._release = release

    def __repr__(self) -> str:
        return f"<UpstreamResponse {self.status} {self._connection or 'closed'}>"

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is a stream of server-sent events."""
        return self.content_type.lower().startswith("text/event-stream")

    def header(self, name: bytes) -> str:
        """Return the value of a header, empty where there is none; ``name`` is in lower case."""
        found = (value for each, value in self.headers if each.lower() == name)
        return next(found, b"").decode("utf-8", "surrogateescape")

    async def read_all(self, size_max_bytes: int) -> bytes:
        """Return the whole body, which has to be here as soon as the call's ``first_byte_s`` says.

        Raises :class:`epd_proxy.errors.BackendError` when it is cut short, late, or over ``size_max_bytes``.
        """
        connection, loop = self._open(), asyncio.get_running_loop()
        if connection.complete and len(self.first) <= size_max_bytes:  # most come whole
            return self.first + connection.take()
        pieces, size_bytes = list[bytes](), 0
        piece = self.first
        while piece:
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > size_max_bytes:
                raise BackendProtocolError(self.backend, f"the instance's answer is over {size_max_bytes} bytes")
            piece = await connection.read(min(self._idle_s, max(0.0, self._until - loop.time())))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pump(self, write: Callable[[bytes], bool], drained: Callable[[], Awaitable[None]]) -> bytes:
        """Have ``write`` called with what comes after ``first``, never re-cut; return the end: see ``Connection.pump``.

        Raises :class:`epd_proxy.errors.BackendError`.
        """
        return await self._open().pump(write, drained, self._idle_s)

    def close(self) -> None:
        """Free the connection: for reuse when the body was read to its end, else closed, which aborts the request."""
        connection, self._connection = self._connection, None
        if connection:
            self._release(connection)

    def _open(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the answer was closed")
        return self._connection
