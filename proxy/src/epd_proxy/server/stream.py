"""An answer that is sent piece by piece."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connection import ClientConnection


class Stream:
    """Writes to the client as fast as it takes it. ``chunked``: not to clients of HTTP/1.0, whose end is the close.

    ``head`` leaves with the first piece, and the end with the last one where that is given to it: each write is a
    system call and, most often, a packet.
    """

    __slots__ = ("_connection", "_head", "chunked")

    def __init__(self, connection: "ClientConnection", head: bytes, *, chunked: bool) -> None:
        self._connection = connection
        self._head = head
        self.chunked = chunked

    def __repr__(self) -> str:
        return f"<Stream {self._connection}>"

    @property
    def closed(self) -> bool:
        """Whether the client has left."""
        return self._connection.closed

    def write(self, piece: bytes) -> bool:
        """Write a piece that is not empty. Returns False when :meth:`drained` is to be awaited before the next."""
        return self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)

    async def drained(self, idle_s: float) -> None:
        """Wait until the client has taken most of what was written.

        Raises :class:`ConnectionResetError` when it left, or did not within ``idle_s`` seconds: then it is cut off.
        """
        await self._connection.drained(idle_s)

    def end(self, last: bytes = b"") -> bool:
        """Write the ``last`` piece, which may be empty; the answer is whole. Returns what :meth:`write` does."""
        if self.chunked:
            last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(last), last) if last else b"0\r\n\r\n"
        return self._send(last)

    def break_off(self) -> None:
        """It is not, and the client's library is to notice: the connection closes after what was written."""
        self._connection.close_after_write()

    def _send(self, data: bytes) -> bool:
        connection = self._connection
        if connection.transport is None:
            return False
        if self._head:
            data, self._head = self._head + data, b""
        if data:
            connection.transport.write(data)
        return not connection.full
