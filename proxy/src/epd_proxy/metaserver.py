"""The internal listener that decode instances call back, one unguessable address for each attempt."""

import asyncio
import logging
import secrets
from typing import Any

import orjson

from .config import MetaserverConfig
from .errors import InvalidRequestError, MethodNotAllowedError, NotFoundError, ProxyError
from .server import Listener, Request, Response, Routes, error_response

log = logging.getLogger(__name__)

_PATH = "/v1/metaserver/"
# The ids of a request's KV blocks: 10,000 blocks take 70 kB.
_BODY_MAX_BYTES = 4 * 1024 * 1024
_BODY_S = 30.0


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
        self._listener: Listener | None = None

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
        routes = Routes(lambda _request, error: error_response(error))
        routes.add_rest(_PATH, _PATH + "{token}", self._answer)
        self._listener = Listener(routes.handle)
        await self._listener.start(self._config.host, self._config.port)
        log.info("decode instances are told to call back at %s", self.url)

    async def close(self) -> None:
        """Stop listening."""
        if self._listener:
            await self._listener.close(grace_s=0.5)

    async def _answer(self, request: Request) -> Response:
        try:
            await self._take_call(request)
        except ProxyError as error:
            return error_response(error)
        return Response(200, b"{}", [("Content-Type", "application/json")])

    async def _take_call(self, request: Request) -> None:
        if request.method != "POST":
            raise MethodNotAllowedError(request.method, _PATH, ("POST",))
        ticket = self._tickets.get(request.path.removeprefix(_PATH))
        if ticket is None:
            raise NotFoundError("no request waits for this call")
        body = await request.read(_BODY_MAX_BYTES, _BODY_S)
        try:
            parameters = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"expected a JSON object: {error}") from error
        if not isinstance(parameters, dict):
            raise InvalidRequestError(f"expected a JSON object, found {type(parameters).__name__}")
        if not ticket.called.done():  # a repeated call changes nothing
            ticket.called.set_result(parameters)
