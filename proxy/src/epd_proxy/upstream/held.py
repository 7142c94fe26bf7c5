"""A connection on which nothing is said: it ends when the process at its other end does."""

import asyncio

from ..errors import BackendConnectError
from .call import Target


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
            return Held(*await asyncio.open_connection(target.host, target.port))
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        raise BackendConnectError(target.backend, "the instance cannot be reached") from error
