"""New connections: names resolved anew every few seconds, each address tried in turn, in time."""

import asyncio
import ssl
from dataclasses import dataclass

from ..errors import BackendConnectError, BackendConnectTimeoutError, BackendTimeoutError
from .call import Target
from .connection import Connection

# A container that is started anew may come back under another address.
_RESOLVED_FOR_S = 5.0


@dataclass(frozen=True, slots=True)
class _Resolved:
    addresses: tuple[str, ...]
    at: float


class Dialer:
    """Opens connections; ``tls`` is for ``https`` backends, by default one that verifies as usual."""

    def __init__(self, connect_s: float, tls: ssl.SSLContext | None = None) -> None:
        self._connect_s = connect_s
        self._tls = tls
        self._resolved: dict[tuple[str, int], _Resolved] = {}

    async def dial(self, target: Target, limit_s: float, registry: set[Connection]) -> Connection:
        """Connect to ``target`` within ``limit_s`` and the configured time, whichever is less.

        Raises :class:`BackendConnectError`, or :class:`BackendTimeoutError` where ``limit_s`` was the shorter.
        """
        try:
            async with asyncio.timeout(min(limit_s, self._connect_s)):
                return await self._try_each(target, registry)
        except TimeoutError as error:
            self._resolved.pop((target.host, target.port), None)
            if limit_s < self._connect_s:
                raise BackendTimeoutError(target.backend, "the instance did not answer in time") from error
            raise BackendConnectTimeoutError(target.backend, "the instance cannot be reached in time") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA cannot write
            self._resolved.pop((target.host, target.port), None)
            raise BackendConnectError(target.backend, "the instance cannot be reached") from error

    async def _try_each(self, target: Target, registry: set[Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        tls = self._context() if target.tls else None
        *others, last = await self._resolve(target)
        for address in (*others, last):
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(target.backend, registry), address, target.port, ssl=tls,
                    server_hostname=target.host if tls else None,
                )  # fmt: skip
            except OSError:
                if address is last:
                    raise
            else:
                return connection
        raise AssertionError("the last address has raised or was returned")

    async def _resolve(self, target: Target) -> tuple[str, ...]:
        loop, key = asyncio.get_running_loop(), (target.host, target.port)
        known = self._resolved.get(key)
        if known is None or loop.time() - known.at > _RESOLVED_FOR_S:
            found = await loop.getaddrinfo(*key, type=1)
            known = _Resolved(tuple(dict.fromkeys(str(each[4][0]) for each in found)), loop.time())
            self._resolved[key] = known
        return known.addresses

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls
