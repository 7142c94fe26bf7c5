"""Which connection a call goes over, and when it is sent a second time."""

import asyncio
import ssl

from ..config import Timeouts
from ..errors import BackendDisconnectError
from .call import Call, Target, parse_target, write_head
from .connection import Connection
from .dialing import Dialer
from .held import Held, hold
from .kept import KEEP_ALIVE_S, KeptConnections
from .response import UpstreamResponse

_STALE_WITHIN_S = 1.0
_TARGETS_MAX = 4096


class Upstream:
    """Sends requests to backends over kept connections. ``tls`` is for ``https`` backends."""

    def __init__(self, timeouts: Timeouts, tls: ssl.SSLContext | None = None) -> None:
        self._idle_s = timeouts.idle_s
        self._dialer = Dialer(timeouts.connect_s, tls)
        self._kept = KeptConnections()
        self._open: set[Connection] = set()
        self._targets: dict[str, Target] = {}
        self._sweep: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Upstream open={len(self._open)} kept={len(self._kept)} {self._dialer}>"

    @property
    def in_use(self) -> int:
        """Number of connections that something is under way on."""
        return len(self._open) - len(self._kept)

    async def start(self) -> None:
        """Begin to close connections that nobody uses; needs a running loop."""
        self._sweep = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._drop_old)

    async def close(self) -> None:
        """Close every connection."""
        if self._sweep:
            self._sweep.cancel()
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)  # the transports close in the loop's next turn

    async def send(self, backend: str, call: Call) -> UpstreamResponse:
        """Send ``call`` to ``backend`` and return when its first bytes are here.

        Raises :class:`epd_proxy.errors.BackendError`.
        """
        loop = asyncio.get_running_loop()
        target = self._targets.get(backend) or self._note_target(backend)
        head = write_head(call, target)
        started = loop.time()
        until = started + call.first_byte_s
        kept = None if call.once else self._kept.take(backend, started)
        if kept:
            try:
                await kept.ask(head, call.body, until)
            except BackendDisconnectError:
                # Most likely the instance closed a kept connection just as we took it, and never saw the request. One
                # that dies of the request takes longer, or does so again on a new connection.
                if kept.answered or loop.time() - started > _STALE_WITHIN_S:
                    raise
            else:
                return UpstreamResponse(kept, self._idle_s, until, self._release)
        connection = await self._dialer.dial(target, until - loop.time(), self._open)
        await connection.ask(head, call.body, until)
        return UpstreamResponse(connection, self._idle_s, until, Connection.abort if call.once else self._release)

    async def hold(self, backend: str, limit_s: float) -> Held:
        """Return a connection that ends when ``backend`` does. Raises :class:`epd_proxy.errors.BackendConnectError`."""
        return await hold(self._targets.get(backend) or self._note_target(backend), limit_s)

    def _release(self, connection: Connection) -> None:
        if connection.keepable:
            self._kept.put(connection, asyncio.get_running_loop().time())
        else:
            connection.abort()

    def _drop_old(self) -> None:
        loop = asyncio.get_running_loop()
        self._kept.drop_old(loop.time())
        self._sweep = loop.call_later(KEEP_ALIVE_S / 2, self._drop_old)

    def _note_target(self, backend: str) -> Target:
        if len(self._targets) >= _TARGETS_MAX:  # instances come and go
            self._targets.clear()
        target = self._targets[backend] = parse_target(backend)
        return target
