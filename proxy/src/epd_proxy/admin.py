"""What operators do to a running proxy, on a listener of its own: add, drain and remove instances, profile them."""

import asyncio
import logging
from typing import Any

import orjson

from .edge import AdminConfig
from .errors import BackendError, InvalidRequestError, NotFoundError, ProxyError, UnauthorizedError
from .keyring import Keyring
from .membership import Membership
from .pool import Endpoint
from .server import Handler, Listener, Request, Response, Routes, error_response
from .upstream import Call, Upstream

log = logging.getLogger(__name__)

_BODY_MAX_BYTES = 64 * 1024
_BODY_S = 30.0
_WAIT_MAX_S = 600.0
# To write a profile takes minutes.
_PROFILE_S = 600.0
_PROFILE_PATHS = ("start_profile", "stop_profile")


class Admin:
    """Serves ``/admin/*`` to those who have the key. Never on the clients' port."""

    def __init__(self, config: AdminConfig, keys: Keyring, membership: Membership, upstream: Upstream) -> None:
        self._config = config
        self._keys = keys
        self._membership = membership
        self._upstream = upstream
        self._listener: Listener | None = None

    @property
    def port(self) -> int:
        """The TCP port it listens on, 0 while it does not."""
        addresses = self._listener.addresses if self._listener else ()
        return addresses[0][1] if addresses else 0

    async def start(self) -> None:
        """Listen. Raises :class:`OSError` when the address cannot be bound."""
        routes = Routes(lambda _request, error: error_response(error))
        routes.add("GET", "/admin/instances", self._list)
        routes.add("POST", "/admin/instances/add", self._add)
        routes.add("POST", "/admin/instances/drain", self._drain)
        routes.add("POST", "/admin/instances/remove", self._remove)
        for path in _PROFILE_PATHS:
            routes.add("POST", f"/admin/{path}", self._profile)
        self._listener = Listener(self._guarded(routes.handle))
        await self._listener.start(self._config.host, self._config.port)
        log.info("operators are served at %s port %d", self._config.host, self.port)

    async def close(self) -> None:
        """Stop listening."""
        if self._listener:
            await self._listener.close(grace_s=0.5)

    def _guarded(self, others: Handler) -> Handler:
        async def handle(request: Request) -> Response | None:
            try:
                scheme, _, given = request.headers.get("authorization", "").partition(" ")
                if scheme.lower() != "bearer" or self._keys.find(given.strip()) is None:
                    raise UnauthorizedError("expected the admin key: Authorization: Bearer KEY")
                return await others(request)
            except ProxyError as error:
                return error_response(error)

        return handle

    async def _list(self, _request: Request) -> Response:
        stages = self._membership.endpoints().items()
        return _json(200, {"stages": {stage: [_describe(e) for e in endpoints] for stage, endpoints in stages}})

    async def _add(self, request: Request) -> Response:
        stage, url = await _read_instance(request)
        endpoint, new = self._membership.add(stage, url)
        return _json(201 if new else 200, _describe(endpoint))

    async def _drain(self, request: Request) -> Response:
        stage, url = await _read_instance(request)
        return _json(200, _describe(self._membership.drain(stage, url)))

    async def _remove(self, request: Request) -> Response:
        """Answer 200 when the instance is gone, 202 while it still has requests; ``?wait_s=`` waits for their end."""
        stage, url = await _read_instance(request)
        wait_s = _read_wait_s(request)
        endpoint = self._membership.remove(stage, url)
        gone = await self._membership.wait_gone(endpoint, wait_s)
        return _json(200 if gone else 202, {**_describe(endpoint), "removed": gone})

    async def _profile(self, request: Request) -> Response:
        """Ask every instance, or those of ``?stage=``, at once; 200 when all of them did it, else 502."""
        path = "/" + request.path.rpartition("/")[2]
        stages = self._membership.endpoints()
        wanted = request.query.get("stage", "")
        if wanted and wanted not in stages:
            raise NotFoundError(f"stage: expected one of {', '.join(stages)}, found {wanted!r}")
        endpoints = [e for stage in ([wanted] if wanted else stages) for e in stages[stage]]
        results = await asyncio.gather(*(self._ask(endpoint, path) for endpoint in endpoints))
        whole = all(result["status"] == 200 for result in results)
        return _json(200 if whole else 502, {"instances": results})

    async def _ask(self, endpoint: Endpoint, path: str) -> dict[str, Any]:
        answer: dict[str, Any] = {"stage": endpoint.stage, "url": endpoint.url}
        try:
            response = await self._upstream.send(endpoint.url, Call(path, headers=[], first_byte_s=_PROFILE_S))
        except BackendError as error:
            return {**answer, "status": 0, "error": str(error)}
        response.close()
        hint = "the instance was started without a profiler (--profiler-config)" if response.status == 404 else ""
        return {**answer, "status": response.status, "error": hint}


def _describe(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "stage": endpoint.stage, "url": endpoint.url, "health": endpoint.health.value, "draining": endpoint.draining,
        "requests": endpoint.active_leases, "cost_tokens": endpoint.active_cost, "error": endpoint.last_error,
    }  # fmt: skip


async def _read_instance(request: Request) -> tuple[str, str]:
    expected = 'expected {"stage": "encode", "url": "http://host:port"}'
    try:
        document = orjson.loads(await request.read(_BODY_MAX_BYTES, _BODY_S))
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"{expected}: {error}") from error
    stage, url = (document.get(name) if isinstance(document, dict) else None for name in ("stage", "url"))
    if not isinstance(stage, str) or not isinstance(url, str):
        raise InvalidRequestError(f"{expected}, found {str(document)[:200]}")
    return stage.replace("-", "_"), url


def _read_wait_s(request: Request) -> float:
    given = request.query.get("wait_s", "0")
    try:
        wait_s = float(given)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= _WAIT_MAX_S:
        raise InvalidRequestError(f"wait_s: expected 0 to {_WAIT_MAX_S:g} seconds, found {given!r}")
    return wait_s


def _json(status: int, document: object) -> Response:
    return Response(status, orjson.dumps(document), [("Content-Type", "application/json")])
