"""The internal listener that decode instances call back, one unguessable address for each attempt."""

import asyncio
import logging
import secrets
from typing import Any

import orjson
from aiohttp import web

from .config import MetaserverConfig

log = logging.getLogger(__name__)

_PATH = "/v1/metaserver/"
# The ids of a request's KV blocks: 10,000 blocks take 70 kB.
_BODY_MAX_BYTES = 4 * 1024 * 1024


class Ticket:
    """One attempt's address. ``called`` is done, with the object that was sent, when decode has called it."""

    def __init__(self, metaserver: "Metaserver", token: str) -> None:
        self.url = metaserver.url + _PATH + token
        self.called: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._metaserver = metaserver
        self._token = token

    def close(self) -> None:
        """Forget the address; calls are answered 404 from here on. Closing twice is harmless."""
        self._metaserver.forget(self._token)


class Metaserver:
    """Hands out tickets, and answers decode at once, whatever the call leads to.

    Decode ignores status and body, and waits for the answer in one of 32 threads (``MooncakeLayerwiseConnector`` of
    vllm-ascend 0.23.0), so an answer that waited for the prefill would limit how many can run.
    """

    def __init__(self, config: MetaserverConfig) -> None:
        self.url = config.advertise_url
        self._config = config
        self._tickets: dict[str, Ticket] = {}
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        return f"<Metaserver {self.url} pending={self.pending}>"

    @property
    def pending(self) -> int:
        """Number of open tickets."""
        return len(self._tickets)

    def open(self) -> Ticket:
        """Return a new ticket; whoever holds it closes it."""
        token = secrets.token_urlsafe(32)
        ticket = self._tickets[token] = Ticket(self, token)
        return ticket

    def forget(self, token: str) -> None:
        """Drop a ticket; see :meth:`Ticket.close`."""
        self._tickets.pop(token, None)

    async def start(self) -> None:
        """Listen. Raises :class:`OSError` when the address cannot be bound."""
        app = web.Application(client_max_size=_BODY_MAX_BYTES)
        app.router.add_post(_PATH + "{token}", self._take_call)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._config.host, self._config.port, reuse_address=True).start()
        log.info("decode instances are told to call back at %s", self.url)

    async def close(self) -> None:
        """Stop listening."""
        if self._runner:
            await self._runner.cleanup()

    async def _take_call(self, request: web.Request) -> web.Response:
        ticket = self._tickets.get(request.match_info["token"])
        if ticket is None:
            return web.Response(status=404, text="no request waits for this call\n")
        try:
            parameters = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            return web.Response(status=400, text=f"expected a JSON object: {error}\n")
        if not isinstance(parameters, dict):
            return web.Response(status=400, text=f"expected a JSON object, found {type(parameters).__name__}\n")
        if not ticket.called.done():  # a repeated call changes nothing
            ticket.called.set_result(parameters)
        return web.json_response({})
