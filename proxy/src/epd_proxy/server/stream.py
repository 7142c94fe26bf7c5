"""An answer that is sent piece by piece."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .connection import ClientConnection


class Stream:
    """Writes to the client as fast as it takes it. ``chunked``: not to clients of HTTP/1.0, whose end is the close."""

    __slots__ = ("_connection", "chunked")

    def __init__(self, connection: "ClientConnection", *, chunked: bool) -> None:
        self._connection = connection
        self.chunked = chunked

    def __repr__(self) -> str:
        return f"<Stream {self._connection}>"

    @property
    def closed(self) -> bool:
        """Whether the client has left."""
        return self._connection.closed

    def write(self, piece: bytes) -> bool:
        """Write a piece that is not empty. Returns False when :meth:`drained` is to be awaited before the next."""
        connection = self._connection
        if connection.transport is None:
            return False
        connection.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.chunked else piece)
        return not connection.full

    async def drained(self, idle_s: float) -> None:
        """Wait until the client has taken most of what was written.

        Raises :class:`ConnectionResetError` when it left, or did not within ``idle_s`` seconds: then it is cut off.
        """
        await self._connection.drained(idle_s)

    def end(self) -> None:
        """The answer is whole."""
        if self.chunked:
            self._connection.write(b"0\r\n\r\n")

    def break_off(self) -> None:
        """It is not, and the client's library is to notice: the connection closes after what was written."""
        self._connection.close_after_write()
