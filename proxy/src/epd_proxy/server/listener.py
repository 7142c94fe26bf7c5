"""The sockets that clients connect to, the connections on them, and how long these may be idle."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ..errors import error_body
from .connection import ClientConnection
from .request import Request
from .response import Headers, Heads, Response
from .routes import Handler

_SWEEP_S = 1.0
_LOOK_S = 0.01
_BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class Waits:
    """In seconds: for a request's head from its first byte on, for the next request (longer than load balancers keep
    connections, an hour at the most), for a client to take the rest of its answer or to send the rest of its body when
    the connection is to be closed.
    """

    head_s: float = 30.0
    idle_s: float = 3630.0
    linger_s: float = 30.0


class Listener:
    """Has ``handle`` answer what comes. ``mark`` returns headers that every answer to a request gets."""

    def __init__(
        self,
        handle: Handler,
        *,
        tls: ssl.SSLContext | None = None,
        waits: Waits | None = None,
        mark: Callable[[Request], Headers] | None = None,
        server: str = "",
    ) -> None:
        self.handle = handle
        self.waits = waits or Waits()
        self.connections: set[ClientConnection] = set()
        self.draining = False
        self._tls = tls
        self._mark = mark
        self._heads = Heads(server)
        self._listening: asyncio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Listener {self.addresses} connections={len(self.connections)}>"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop it runs on."""
        return asyncio.get_running_loop()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Hosts and ports it listens on."""
        # A list, as uvloop has it, is no tuple to compiled code.
        sockets = cast(Any, self._listening).sockets if self._listening else ()
        return [each.getsockname()[:2] for each in sockets]

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> None:
        """Listen. Raises :class:`OSError` when the address cannot be bound."""
        loop = self.loop
        self._listening = await loop.create_server(
            lambda: ClientConnection(self), host or None, port, ssl=self._tls, backlog=_BACKLOG, reuse_address=True,
            reuse_port=reuse_port or None,
        )  # fmt: skip
        self._sweeping = loop.call_later(_SWEEP_S, self._sweep)

    def stop(self) -> None:
        """Take no new connections, and close those there are after their next answer.

        Idle ones stay: who has just sent a request over one would have to find out whether it was seen.
        """
        self.draining = True
        if self._listening:
            self._listening.close()

    async def close(self, grace_s: float = 1.0) -> None:
        """Stop, and close every connection: the idle ones now, the others when ``grace_s`` is up at the latest."""
        self.stop()
        if self._sweeping:
            self._sweeping.cancel()
        for connection in list(self.connections):
            connection.close_idle()
        for _ in range(round(grace_s / _LOOK_S)):
            if not self.connections:
                break
            await asyncio.sleep(_LOOK_S)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)  # the transports close in the loop's next turn

    def write_head(self, request: Request | None, status: int, headers: Headers, framing: str) -> bytes:
        """Return a response's head."""
        if request and self._mark:
            headers = headers + self._mark(request)
        return self._heads.write(status, headers, framing)

    def refuse(self, status: int, why: str) -> Response:
        """Return the answer to what no handler can answer."""
        kind = "BadRequestError" if status < 500 else "InternalServerError"
        return Response(status, error_body(why, kind, status), [("Content-Type", "application/json")])

    def _sweep(self) -> None:
        """Close what waits for too long: one timer for all, as one for each request would cost more than the rest."""
        loop = self.loop
        now = loop.time()
        for connection in [each for each in self.connections if each.deadline < now]:
            connection.abort()
        self._sweeping = loop.call_later(_SWEEP_S, self._sweep)
