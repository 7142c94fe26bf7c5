"""The HTTP edge for requests that need no stage: passed on untouched, but for what only the stages may say."""

import re

from . import protocol
from .access import AccessRecord
from .aside import run_aside
from .errors import InvalidRequestError, MethodNotAllowedError, NotFoundError, NotOfferedError
from .flows import Forwarding
from .handlers import Handlers, wait_for_turn
from .server import Request, Response, Routes
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

    def add_routes(self, routes: Routes) -> None:
        """Add the paths."""
        routes.add("GET", "/v1/models", self._handlers.served(self._models))
        pass_on = self._handlers.served(self._pass_on)
        for path in _TOKENS:
            routes.add("POST", path, pass_on)
        routes.add_rest("/v1/", "/v1/{rest}", pass_on)

    async def _models(self, request: Request, record: AccessRecord) -> Response:
        body = await self._forwarding.models(self._handlers.headers_of(request), record)
        record.status, record.bytes_out = 200, len(body)
        return Response(200, body, [("Content-Type", "application/json"), ("X-Request-Id", record.request_id)])

    async def _pass_on(self, request: Request, record: AccessRecord) -> Response | None:
        _check(request)
        admission = self._handlers.admission
        if not admission.try_enter():
            await wait_for_turn(admission, record)
        try:
            return await self._forward(request, record)
        finally:
            admission.leave()

    async def _forward(self, request: Request, record: AccessRecord) -> Response | None:
        with self._handlers.bodies.share() as share:
            body = await self._handlers.bodies.read(request, share)
            record.bytes_in = len(body)
            if "json" in request.headers.get("content-type", "json").lower() and body:
                body = await run_aside(len(body), protocol.strip_transfer_params, body)
            call = Call(
                request.target,
                [*self._handlers.headers_of(request), ("X-Request-Id", record.request_id)],
                self._first_byte_s,
                body=body or None,
                method="GET" if request.method == "HEAD" else request.method,  # the server leaves the body out
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


def _check(request: Request) -> None:
    """Raise for what is not to reach an instance."""
    path = request.path
    if path in _OF_THE_STAGES:
        raise MethodNotAllowedError(request.method, path, ("POST",))
    if request.method not in _METHODS:
        raise MethodNotAllowedError(request.method, path, _METHODS)
    if path in _OF_ONE_INSTANCE:
        raise NotOfferedError(f"{path} changes one instance only: send it to each of them")
    if "websocket" in request.headers.get("upgrade", "").lower():  # others may be ignored, as Java's offer of HTTP/2
        raise NotOfferedError("WebSockets are not offered")
    if path.startswith("/v1/metaserver") or ".." in path.split("/") or "//" in path:
        raise NotFoundError(f"there is nothing at {path}")
    if any(ord(char) < 0x21 for char in request.target):
        raise InvalidRequestError("expected a path without spaces and control characters")
