"""The HTTP edge for clients: bodies in, answers or OpenAI-style errors out, one log line each."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from aiohttp import web

from . import plan, protocol
from .admission import Admission
from .aside import run_aside
from .bodies import Bodies
from .config import ProxyConfig
from .errors import (
    MethodNotAllowedError,
    NotFoundError,
    ProxyError,
    UnavailableError,
)
from .flows import Flow, Job
from .guard import BackendKey, Guard
from .logs import AccessRecord, log_access
from .metrics import Metrics
from .relay import SERVER, Answer, send_answer
from .tracing import Tracing

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CLIENT_LEFT = 499
_RETRY_AFTER_S = 1


class Handlers:
    """Serves the clients' requests and knows which are running."""

    def __init__(
        self,
        flow: Flow,
        metrics: Metrics,
        config: ProxyConfig,
        stages: Collection[str],
        *,
        guard: Guard | None = None,
        backend_key: BackendKey | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._guard = guard
        self._backend_key = backend_key
        self._tracing = tracing
        self._flow = flow
        self._metrics = metrics
        self._items_max = config.limits.media_items
        self._items = config.items
        self._split_by = plan.Handshake(config.handshake.name)
        self._balance = config.balance
        self._admission = Admission(config.admission, lambda reason: metrics.refusals.labels(reason).inc())
        metrics.watch_admission(lambda: self._admission.running, lambda: self._admission.queued)
        self._write_idle_s = config.timeouts.write_idle_s
        self.bodies = Bodies(config.limits, config.timeouts.body_idle_s)
        self._stages = stages  # live: instances come and go
        self._running: set[asyncio.Task[object]] = set()
        self.draining = False

    def __repr__(self) -> str:
        return f"<Handlers running={len(self._running)} draining={self.draining}>"

    def add_routes(self, app: web.Application) -> None:
        """Add what clients may call."""
        for api in protocol.APIS:
            app.router.add_route("POST", api.path, self._inference(api), expect_handler=self.on_expect)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the running ones, and end those that are left after ``timeout_s``."""
        self.draining = True
        if self._running:
            log.info("waiting up to %.0f s for %d requests to end", timeout_s, len(self._running))
            _, late = await asyncio.wait(self._running, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d requests did not end within %.0f s and were closed", len(late), timeout_s)
                await asyncio.wait(late, timeout=1)

    def _inference(self, api: protocol.Api) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            return await self.serve(request, lambda record: self.in_turn(lambda: self._infer(api, request, record)))

        return handle

    async def _infer(self, api: protocol.Api, request: web.Request, record: AccessRecord) -> web.StreamResponse:
        # The body is given up when the answer has begun: a stream may go on for long, and others need the memory.
        with self.bodies.share() as share:
            body = await self.bodies.read(request, share)
            answer = await self._open(api, request, body, record)
            del body
        return await self.send(answer, request, record, api.stream_end)

    async def send(
        self, answer: Answer, request: web.Request, record: AccessRecord, stream_end: bytes = b""
    ) -> web.StreamResponse:
        """Send an open answer to the client, and close it."""
        return await send_answer(
            answer, request, record, self._metrics, write_idle_s=self._write_idle_s, stream_end=stream_end
        )

    async def _open(self, api: protocol.Api, request: web.Request, body: bytes, record: AccessRecord) -> Answer:
        record.bytes_in = len(body)
        parsed = await run_aside(
            len(body), protocol.parse_request, api, body, items_max=self._items_max, key=self._items.key,
            tenant=protocol.tenant_of(request.headers, self._items.tenant_headers),
        )  # fmt: skip
        record.model, record.stream, record.items = parsed.model, parsed.stream, len(parsed.items)
        planned = plan.build(parsed, self._stages, self._split_by)
        record.handshake = planned.handshake.value
        job = Job(parsed, planned, self.headers_of(request), record, self._affinity(request, parsed))
        return await self._flow.answer(job)

    def _affinity(self, request: web.Request, parsed: protocol.InferenceRequest) -> str:
        if self._balance.policy == "session":
            return request.headers.get(self._balance.session_header, "")
        return protocol.prefix_of(parsed) if self._balance.policy == "prefix" else ""

    def headers_of(self, request: web.Request) -> protocol.Headers:
        """Return the client's headers that go to every stage."""
        headers = protocol.forwarded_headers(request.headers)
        return self._backend_key.replace_in(headers) if self._backend_key else headers

    async def serve(
        self, request: web.Request, answer: Callable[[AccessRecord], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Let the client in, return what ``answer`` makes of its request or an error, log and count it."""
        record = _open_record(request)
        if self._tracing is None:
            return await self._serve(request, record, answer)
        with self._tracing.request(request.headers, record, _route_of(request)):
            return await self._serve(request, record, answer)

    async def in_turn(self, work: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Do ``work`` when it is its turn. Raises :class:`ProxyError` when too many others wait."""
        await self._admission.enter()
        try:
            return await work()
        finally:
            self._admission.leave()

    async def _serve(
        self,
        request: web.Request,
        record: AccessRecord,
        answer: Callable[[AccessRecord], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a handler runs in a task")
        self._running.add(task)
        try:
            if self.draining:
                raise UnavailableError("the proxy is shutting down")
            if self._guard:
                record.key = self._guard.admit(request)
            return await answer(record)
        except ProxyError as error:
            return _error_response(error, record)
        except (asyncio.CancelledError, ConnectionError):
            record.status = record.status or _CLIENT_LEFT
            record.error = record.error or "the client left"
            # aiohttp logs a ConnectionError as a failure of ours, and tries to answer; a cancelled handler it lets go.
            raise asyncio.CancelledError from None
        except Exception:
            log.exception("request %s failed", record.request_id)
            return _error_response(ProxyError("the proxy failed to serve the request"), record)
        finally:
            self._running.discard(task)
            self._count(request, record)

    def _count(self, request: web.Request, record: AccessRecord) -> None:
        path = _route_of(request)
        self._metrics.requests.labels(path, str(record.status)).inc()
        self._metrics.request_seconds.labels(path).observe(record.elapsed_s())
        if record.first_byte_s:
            self._metrics.first_byte_seconds.labels(path).observe(record.first_byte_s)
        log_access(record)

    async def on_expect(self, request: web.Request) -> web.StreamResponse | None:
        """Answer ``Expect: 100-continue``: a body that is too large need not be sent at all."""
        try:
            if self._guard:
                self._guard.admit(request)
            self.bodies.check(request.content_length or 0)
        except ProxyError as error:
            return self._refuse(request, error)
        if request.headers["Expect"].lower() == "100-continue" and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return None

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Give aiohttp's own errors (no such path, wrong method) OpenAI's form."""
        try:
            return await handler(request)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            problem = MethodNotAllowedError(f"{request.path} takes {allowed}, not {request.method}")
            response = self._refuse(request, problem)
            response.headers["Allow"] = allowed
            return response
        except web.HTTPNotFound:
            return self._refuse(request, NotFoundError(f"there is nothing at {request.path}"))

    def _refuse(self, request: web.Request, error: ProxyError) -> web.Response:
        """Answer, log and count a request that no handler has seen."""
        record = _open_record(request)
        response = _error_response(error, record)
        self._count(request, record)
        return response


def _route_of(request: web.Request) -> str:
    """Return the path as it was registered: clients choose what stands in it."""
    resource = request.match_info.route.resource
    return resource.canonical if resource else "other"


def _open_record(request: web.Request) -> AccessRecord:
    return AccessRecord(
        method=request.method,
        path=request.path,
        request_id=protocol.choose_request_id(request.headers),
        client=request.remote or "",
        trace_id=protocol.trace_id(request.headers),
    )


def _error_response(error: ProxyError, record: AccessRecord) -> web.Response:
    body = protocol.error_for(record.path, error.body())
    record.status, record.error, record.bytes_out = error.status, error.detail, len(body)
    headers = {"X-Request-Id": record.request_id, "Server": SERVER}
    if content_type := error.content_type:
        headers["Content-Type"] = content_type
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["Retry-After"] = str(_RETRY_AFTER_S)
    return web.Response(status=error.status, body=body, headers=headers)
