"""The HTTP edge for clients: bodies in, answers or OpenAI-style errors out, one log line each."""

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from . import plan, protocol
from .access import AccessRecord
from .admission import Admission
from .aside import is_large
from .bodies import Bodies
from .config import ProxyConfig
from .errors import ProxyError, UnavailableError
from .flows import Flow, Job
from .guard import BackendKey, Guard
from .logs import log_access
from .metrics import Metrics
from .relay import Answer, send_answer
from .server import Handler, Request, Response, Routes, error_response
from .tracing import Tracing

log = logging.getLogger(__name__)

Work = Callable[[Request, AccessRecord], Awaitable[Response | None]]

_CLIENT_LEFT = 499


async def wait_for_turn(admission: Admission, record: AccessRecord) -> None:
    """Wait for a place, and note how long that took, also when it was in vain. Raises what ``Admission.enter`` does."""
    since = time.monotonic()
    try:
        await admission.enter()
    finally:
        record.queue_s = time.monotonic() - since


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
        self._item_key = config.items.key
        self._tenant_headers = tuple(name.lower() for name in config.items.tenant_headers)
        self._split_by = plan.Handshake(config.handshake.name)
        self._balance = config.balance
        self.admission = Admission(config.admission, lambda reason: metrics.refusals[reason,].inc())
        metrics.watch_admission(lambda: self.admission.running, lambda: self.admission.queued)
        self._write_idle_s = config.timeouts.write_idle_s
        self.bodies = Bodies(config.limits, config.timeouts.body_idle_s)
        self._stages = stages  # live: instances come and go
        self._running: set[Request] = set()
        self._emptied: asyncio.Future[None] | None = None
        self.draining = False

    def __repr__(self) -> str:
        return f"<Handlers running={len(self._running)} draining={self.draining}>"

    def add_routes(self, routes: Routes) -> None:
        """Add what clients may call."""
        for api in protocol.APIS:
            routes.add("POST", api.path, self._inference(api))

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait for the running ones, and end those that are left after ``timeout_s``."""
        self.draining = True
        if not self._running:
            return
        log.info("waiting up to %.0f s for %d requests to end", timeout_s, len(self._running))
        self._emptied = asyncio.get_running_loop().create_future()
        await asyncio.wait((self._emptied,), timeout=timeout_s)
        if late := list(self._running):
            log.warning("%d requests did not end within %.0f s and were closed", len(late), timeout_s)
            for request in late:
                request.cancel()
            await asyncio.wait((self._emptied,), timeout=1)

    def _inference(self, api: protocol.Api) -> Handler:
        admission, bodies = self.admission, self.bodies

        async def infer(request: Request, record: AccessRecord) -> Response | None:
            if not admission.try_enter():
                await wait_for_turn(admission, record)
            try:
                # The body is given up when the answer has begun: a stream may go on for long, and others need the
                # memory.
                with bodies.share() as share:
                    body = await bodies.read(request, share)
                    answer = await self._open(api, request, body, record)
                    del body
                return await self.send(answer, request, record, api.stream_end)
            finally:
                admission.leave()

        return self.served(infer)

    def send(
        self, answer: Answer, request: Request, record: AccessRecord, stream_end: bytes = b""
    ) -> Coroutine[Any, Any, Response | None]:
        """Send an open answer to the client, and close it."""
        return send_answer(
            answer, request, record, self._metrics, write_idle_s=self._write_idle_s, stream_end=stream_end
        )

    async def _open(self, api: protocol.Api, request: Request, body: bytes, record: AccessRecord) -> Answer:
        record.bytes_in = len(body)
        tenant = protocol.tenant_of(request.headers, self._tenant_headers)
        if is_large(len(body)):
            parsed, planned = await asyncio.to_thread(self._read, api, body, tenant)
        else:
            parsed, planned = self._read(api, body, tenant)
        _note(parsed, record)
        record.handshake = planned.handshake.value
        job = Job(parsed, planned, self.headers_of(request), record, self._affinity(request, parsed))
        return await self._flow.answer(job)

    def _read(self, api: protocol.Api, body: bytes, tenant: str) -> tuple[protocol.InferenceRequest, plan.Plan]:
        parsed = protocol.parse_request(api, body, items_max=self._items_max, key=self._item_key, tenant=tenant)
        return parsed, plan.build(parsed, self._stages, self._split_by)

    def _affinity(self, request: Request, parsed: protocol.InferenceRequest) -> str:
        if self._balance.policy == "session":
            return request.headers.get(self._balance.session_header.lower(), "")
        return protocol.prefix_of(parsed) if self._balance.policy == "prefix" else ""

    def headers_of(self, request: Request) -> protocol.Headers:
        """Return the client's headers that go to every stage."""
        connection = request.headers.get("connection", "")
        if connection and len(request.headers) < len(request.header_lines):  # there may be several
            connection = ",".join(value for name, value in request.header_lines if name.lower() == "connection")
        headers = protocol.forwarded_headers(request.header_lines, connection)
        return self._backend_key.replace_in(headers) if self._backend_key else headers

    def served(self, work: Work) -> Handler:
        """Return a handler that lets the client in, answers with what ``work`` gives or an error, logs and counts."""

        tracing = self._tracing
        if tracing is None:
            return lambda request: self._serve(request, _open_record(request), work)

        async def trace(request: Request) -> Response | None:
            record = _open_record(request)
            with tracing.request(request.headers, record, request.route):
                return await self._serve(request, record, work)

        return trace

    async def _serve(self, request: Request, record: AccessRecord, work: Work) -> Response | None:
        self._running.add(request)
        try:
            if self.draining:
                raise UnavailableError("the proxy is shutting down")
            if self._guard:
                self._admit(self._guard, request, record)
            return await work(request, record)
        except ProxyError as error:
            _let_go(error)
            return _answer_error(error, record)
        except (asyncio.CancelledError, ConnectionError) as error:
            _let_go(error)
            record.status = record.status or _CLIENT_LEFT
            record.error = record.error or "the client left"
        except Exception as error:
            log.exception("request %s failed", record.request_id)
            _let_go(error)
            return _answer_error(ProxyError("the proxy failed to serve the request"), record)
        finally:
            self._running.discard(request)
            if self._emptied and not self._running and not self._emptied.done():
                self._emptied.set_result(None)
            self._count(request, record)
        raise asyncio.CancelledError  # nobody is there to be answered

    def _admit(self, guard: Guard, request: Request, record: AccessRecord) -> None:
        if key := guard.admit(request):
            record.key = key

    def _count(self, request: Request, record: AccessRecord) -> None:
        route, metrics = request.route, self._metrics
        metrics.requests[route, str(record.status)].inc()
        metrics.request_seconds[route,].observe(record.elapsed_s())
        if record.first_byte_s:
            metrics.first_byte_seconds[route,].observe(record.first_byte_s)
        log_access(record)

    def refuse(self, request: Request, error: ProxyError) -> Response:
        """Answer, log and count a request that no handler has seen."""
        record = _open_record(request)
        response = _answer_error(error, record)
        self._count(request, record)
        return response


def _let_go(error: BaseException) -> None:
    """Empty the frames that failed: a task of theirs may hold them by its traceback, and they hold the body."""
    found: list[BaseException] = [error]
    for each in found:  # which grows
        traceback.clear_frames(each.__traceback__)
        found += [one for one in (each.__cause__, each.__context__) if one is not None and one not in found]


def _open_record(request: Request) -> AccessRecord:
    headers = request.headers
    record = AccessRecord(request.method, request.path, protocol.choose_request_id(headers))
    if request.remote:
        record.client = request.remote
    if trace_id := protocol.trace_id(headers):
        record.trace_id = trace_id
    return record


def _note(parsed: protocol.InferenceRequest, record: AccessRecord) -> None:
    if model := parsed.model:
        record.model = model
    if parsed.stream:
        record.stream = True
    if parsed.items:
        record.items = len(parsed.items)


def _answer_error(error: ProxyError, record: AccessRecord) -> Response:
    response = error_response(error, protocol.error_for(record.path, error.body()))
    record.status, record.error, record.bytes_out = error.status, error.detail, len(response.body)
    response.headers.append(("X-Request-Id", record.request_id))
    return response
