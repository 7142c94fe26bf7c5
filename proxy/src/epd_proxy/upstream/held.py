"""A connection on which nothing is said: it ends when the process at its other end does."""

import asyncio
import socket

from ..errors import BackendConnectError
from .call import Target

# What vanished without a word, a host that lost power, is found out by the kernel.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class Held:
    """Such a connection. Whoever holds it closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ended(self) -> None:
        """Return when the other end has closed it; what it sends meanwhile is dropped."""
        try:
            while await self._reader.read(1024):
                pass
        except OSError:
            return

    def close(self) -> None:
        """Close it."""
        self._writer.transport.abort()


async def hold(target: Target, limit_s: float) -> Held:
    """Connect to ``target``, without TLS, within ``limit_s``. Raises :class:`BackendConnectError`."""
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection(target.host, target.port)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        raise BackendConnectError(target.backend, "the instance cannot be reached") from error
    for option in _KEEP_ALIVE:
        writer.get_extra_info("socket").setsockopt(*option)
    return Held(reader, writer)
