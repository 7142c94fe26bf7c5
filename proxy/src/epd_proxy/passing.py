"""The HTTP edge for requests that need no stage: passed on untouched, but for what only the stages may say."""

import re

from aiohttp import web

from . import protocol
from .aside import run_aside
from .errors import InvalidRequestError, NotFoundError, NotOfferedError
from .flows import Forwarding
from .handlers import Handlers
from .logs import AccessRecord
from .relay import SERVER
from .upstream import Call

_OF_THE_STAGES = frozenset(api.path for api in protocol.APIS)
_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE"))
_TOKENS = ("/tokenize", "/detokenize")
# They change the one instance that they reach, and no other.
_OF_ONE_INSTANCE = frozenset(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"))
_STORED = re.compile(r"/v1/responses/[^/]+(/cancel)?")


class Passing:
    """Serves ``/v1/models``, and what else is below ``/v1`` and no path of the stages."""

    def __init__(self, handlers: Handlers, forwarding: Forwarding, first_byte_s: float) -> None:
        self._handlers = handlers
        self._forwarding = forwarding
        self._first_byte_s = first_byte_s

    def add_routes(self, app: web.Application) -> None:
        """Add the paths. To be called after all others below ``/v1`` were added: the first that matches counts."""
        app.router.add_get("/v1/models", self._models)
        for path in _TOKENS:
            app.router.add_route("POST", path, self._pass_on, expect_handler=self._handlers.on_expect)
        app.router.add_route("*", "/v1/{rest:.+}", self._pass_on, expect_handler=self._handlers.on_expect)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        async def answer(record: AccessRecord) -> web.StreamResponse:
            body = await self._forwarding.models(self._handlers.headers_of(request), record)
            record.status, record.bytes_out = 200, len(body)
            headers = {"X-Request-Id": record.request_id, "Server": SERVER}
            return web.Response(body=body, content_type="application/json", headers=headers)

        return await self._handlers.serve(request, answer)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        if request.path in _OF_THE_STAGES:  # whose POST has a route of its own
            raise web.HTTPMethodNotAllowed(request.method, ("POST",))
        if request.method not in _METHODS:
            raise web.HTTPMethodNotAllowed(request.method, _METHODS)

        async def answer(record: AccessRecord) -> web.StreamResponse:
            _check(request)
            return await self._handlers.in_turn(lambda: self._forward(request, record))

        return await self._handlers.serve(request, answer)

    async def _forward(self, request: web.Request, record: AccessRecord) -> web.StreamResponse:
        with self._handlers.bodies.share() as share:
            body = await self._handlers.bodies.read(request, share)
            record.bytes_in = len(body)
            if "json" in request.headers.get("Content-Type", "json").lower() and body:
                body = await run_aside(len(body), protocol.strip_transfer_params, body)
            call = Call(
                request.raw_path,
                [*self._handlers.headers_of(request), ("X-Request-Id", record.request_id)],
                self._first_byte_s,
                body=body or None,
                method=request.method,
            )
            stored = _STORED.fullmatch(request.path) is not None
            opened = await self._forwarding.answer(
                call,
                len(body) // protocol.CHARS_PER_TOKEN + 1,
                record,
                runs_model=stored or (request.method == "POST" and request.path not in _TOKENS),
                elsewhere=stored,
            )
            del body
        return await self._handlers.send(opened, request, record)


def _check(request: web.Request) -> None:
    """Raise for what is not to reach an instance."""
    path = request.path
    if path in _OF_ONE_INSTANCE:
        raise NotOfferedError(f"{path} changes one instance only: send it to each of them")
    if "Upgrade" in request.headers:
        raise NotOfferedError("WebSockets are not offered")
    if path.startswith("/v1/metaserver") or ".." in path.split("/") or "//" in path:
        raise NotFoundError(f"there is nothing at {path}")
    if any(ord(char) < 0x21 for char in request.raw_path):
        raise InvalidRequestError("the path has a space or a control character in it")
