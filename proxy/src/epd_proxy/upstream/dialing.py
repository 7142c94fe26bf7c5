"""New connections: names resolved anew every few seconds, each address tried in turn, with its share of the time."""

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass

from ..errors import BackendConnectError, BackendConnectTimeoutError, BackendTimeoutError
from .call import Target
from .connection import Connection

# A container that is started anew may come back under another address.
_RESOLVED_FOR_S = 5.0
# A question to Docker's name server that gets lost is asked again after 5 s: what is known already serves sooner.
_ANSWERED_WITHIN_S = 0.5
_NAMES_MAX = 1024


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

    def __repr__(self) -> str:
        return f"<Dialer names={len(self._resolved)}>"

    async def dial(self, target: Target, limit_s: float, registry: set[Connection]) -> Connection:
        """Connect to ``target`` within ``limit_s`` and the configured time, whichever is less.

        Raises :class:`BackendConnectError`, or :class:`BackendTimeoutError` where ``limit_s`` was the shorter.
        """
        until = asyncio.get_running_loop().time() + min(limit_s, self._connect_s)
        try:
            async with asyncio.timeout_at(until):
                return await self._try_each(target, until, registry)
        except TimeoutError as error:
            self._resolved.pop((target.host, target.port), None)
            if limit_s < self._connect_s:
                raise BackendTimeoutError(target.backend, "the instance did not answer in time") from error
            raise BackendConnectTimeoutError(target.backend, "the instance cannot be reached in time") from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA cannot write
            self._resolved.pop((target.host, target.port), None)
            raise BackendConnectError(target.backend, "the instance cannot be reached") from error

    async def _try_each(self, target: Target, until: float, registry: set[Connection]) -> Connection:
        """Connect to the first address that takes it. One that says nothing must leave time for those after it."""
        loop = asyncio.get_running_loop()
        *others, last = await self._resolve(target)
        for index, address in enumerate(others):
            share_s = (until - loop.time()) / (len(others) + 1 - index)
            with contextlib.suppress(OSError):  # TimeoutError is one
                async with asyncio.timeout(share_s):
                    return await self._connect(target, address, registry)
        return await self._connect(target, last, registry)

    async def _connect(self, target: Target, address: str, registry: set[Connection]) -> Connection:
        tls = self._context() if target.tls else None
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(target.backend, registry), address, target.port, ssl=tls,
            server_hostname=target.host if tls else None,
        )  # fmt: skip
        return connection

    async def _resolve(self, target: Target) -> tuple[str, ...]:
        if target.is_address:  # AI_ADDRCONFIG would refuse ::1 where no interface has IPv6
            return (target.host,)
        loop, key = asyncio.get_running_loop(), (target.host, target.port)
        known = self._resolved.get(key)
        if known is not None and loop.time() - known.at <= _RESOLVED_FOR_S:
            return known.addresses
        if known is None:
            found = await _look_up(*key)
            if len(self._resolved) >= _NAMES_MAX:  # instances come and go
                self._resolved.clear()
        else:
            self._resolved[key] = _Resolved(known.addresses, loop.time())  # one asks, the others go on with these
            try:
                found = await asyncio.wait_for(_look_up(*key), _ANSWERED_WITHIN_S)
            except TimeoutError:
                return known.addresses
        self._resolved[key] = _Resolved(found, loop.time())
        return found

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


async def _look_up(host: str, port: int) -> tuple[str, ...]:
    # Without AI_ADDRCONFIG the C library asks for IPv6 too, at the same moment, where there is none: behind the address
    # translation of a container one of two such questions gets lost now and then.
    asking = asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return tuple(dict.fromkeys(str(each[4][0]) for each in await asking))
