"""A backend's answer to the client's response: bytes in, bytes out.

:class:`Answer` owns the lease and the connection behind it; ``Answer.close`` is the one place that gives both back.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable

from aiohttp import web
from multidict import CIMultiDict

from .errors import BackendDisconnectError, BackendError, UnavailableError
from .logs import AccessRecord
from .metrics import Metrics
from .pool import Lease
from .protocol import error_for, returned_headers
from .tracing import StageSpan
from .upstream import UpstreamResponse

log = logging.getLogger(__name__)

SERVER = "epd-proxy"
# As much as a transport takes without waiting for the client (asyncio's high-water mark).
_PIECE_BYTES = 64 * 1024


class Answer:
    """A backend's answer and the lease it runs on. Closing twice is harmless."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.response: UpstreamResponse | None = None
        self.whole: bytes | None = None
        self.span: StageSpan | None = None

    def __repr__(self) -> str:
        return f"<Answer {self.lease.endpoint} status={self.response and self.response.status}>"

    def close(self) -> None:
        """Give the lease back and the connection up; an answer still under way is aborted at the backend."""
        if self.response:
            self.response.close()
        if self.span:
            self.span.end(self.response.status if self.response else None, "" if self.response else "no answer")
        self.lease.release()


async def send_answer(
    answer: Answer,
    request: web.Request,
    record: AccessRecord,
    metrics: Metrics,
    *,
    write_idle_s: float,
    stream_end: bytes = b"",
) -> web.StreamResponse:
    """Send ``answer`` to the client and close it, whatever happens.

    ``stream_end`` is what a complete event stream ends with. After the first byte a failure is told as an SSE ``error``
    event, and the connection is closed. A client that takes nothing for ``write_idle_s`` seconds is cut off.
    """
    try:
        if answer.response is None:
            raise RuntimeError("the answer was not opened")
        record.status = answer.response.status
        if answer.whole is not None:
            answer.close()  # the instance is done; how long the client takes is no load of its
            return await _send_whole(answer.response, answer.whole, _Outlet(request, record, write_idle_s))
        outlet = _Outlet(request, record, write_idle_s)
        return await _Stream(answer.response, outlet, metrics, stream_end).run()
    finally:
        answer.close()


class _Outlet:
    """Where a response's bytes go: to a client, as long as it takes them."""

    def __init__(self, request: web.Request, record: AccessRecord, idle_s: float) -> None:
        self.request = request
        self.record = record
        self._idle_s = idle_s

    async def write(self, response: web.StreamResponse, piece: bytes) -> None:
        """Write ``piece``. Raises :class:`ConnectionResetError` when the client takes nothing for too long."""
        await self._in_time(response.write(piece))
        self.record.bytes_out += len(piece)

    async def drained(self) -> None:
        """Wait until the client has taken most of what was written to its transport. Raises as :meth:`write`."""
        await asyncio.sleep(0)  # uvloop writes at the end of a turn
        if self.request.transport is None:
            raise ConnectionResetError("the client left")
        await self._in_time(self.request.writer.drain())

    async def _in_time(self, waiting: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._idle_s):
                await waiting
        except TimeoutError as error:
            self.record.error = f"the client took nothing of its answer for {self._idle_s:g} s"
            if self.request.transport:
                self.request.transport.abort()
            raise ConnectionResetError(self.record.error) from error


async def _send_whole(upstream: UpstreamResponse, body: bytes, outlet: _Outlet) -> web.StreamResponse:
    record = outlet.record
    record.first_byte_s = record.first_byte_s or record.elapsed_s()
    headers = _headers(upstream, record)
    if len(body) <= _PIECE_BYTES or outlet.request.method == "HEAD":
        record.bytes_out = len(body)
        return web.Response(status=upstream.status, body=body, headers=headers)
    # aiohttp would wait for ever until it can write the last byte.
    sent = web.StreamResponse(status=upstream.status, headers=headers)
    sent.content_length = len(body)
    await sent.prepare(outlet.request)
    for start in range(0, len(body), _PIECE_BYTES):
        await outlet.write(sent, body[start : start + _PIECE_BYTES])
    return sent


def _headers(upstream: UpstreamResponse, record: AccessRecord) -> CIMultiDict[str]:
    headers = returned_headers(upstream.headers)
    return CIMultiDict([*headers, ("X-Request-Id", record.request_id), ("Server", SERVER)])


class _Stream:
    """One event stream on its way to the client."""

    def __init__(self, upstream: UpstreamResponse, outlet: _Outlet, metrics: Metrics, end: bytes) -> None:
        self._upstream = upstream
        self._outlet = outlet
        self._request = outlet.request
        self._record = outlet.record
        self._metrics = metrics
        self._end = end
        self._response = web.StreamResponse(status=upstream.status, headers=_headers(upstream, self._record))
        self._chunked = False
        self._tail = b""
        self._pieces = 0
        self._came = 0.0
        self._longest_s = 0.0

    async def run(self) -> web.StreamResponse:
        """Relay until the end; a failure of the backend becomes an event, the client's leaving is raised."""
        await self._response.prepare(self._request)
        self._chunked = self._response.headers.get("Transfer-Encoding") == "chunked"  # not to HTTP/1.0 clients
        self._record.first_byte_s = self._record.elapsed_s()
        try:
            await self._outlet.write(self._response, self._upstream.first)  # the head goes with it
            self._note(self._upstream.first)
            await self._upstream.pump(self._write, self._outlet.drained)
            self._check_end()
            self._count()
            await self._response.write_eof()
        except BackendError as error:
            await self._break(error)
        except asyncio.CancelledError:
            # Either the client left, then nobody reads this, or the proxy is shutting down.
            with contextlib.suppress(ConnectionError):
                await self._break(UnavailableError("the proxy was stopped before the answer was complete"))
            raise
        return self._response

    def _write(self, piece: bytes) -> bool:
        """Write to the client's transport itself. Returns False when it holds enough, or the client is gone."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
        self._record.bytes_out += len(piece)
        self._note(piece)
        return transport.get_write_buffer_size() <= _PIECE_BYTES

    def _note(self, piece: bytes) -> None:
        self._tail = piece if len(piece) >= 32 else (self._tail + piece)[-32:]
        came = time.monotonic()
        if self._pieces and came - self._came > self._longest_s:
            self._longest_s = came - self._came
        self._pieces += 1
        self._came = came

    def _count(self) -> None:
        """Count how evenly the events came: a piece is one of them, as long as they are taken as they come."""
        resource, record = self._request.match_info.route.resource, self._record
        path = resource.canonical if resource else ""  # not the path itself: clients choose that
        self._metrics.first_token_seconds.labels(path).observe(record.first_byte_s)
        if self._pieces > 1:
            mean_s = (self._came - record.started - record.first_byte_s) / (self._pieces - 1)
            self._metrics.token_seconds.labels(path).observe(max(0.0, mean_s))
            self._metrics.token_seconds_max.labels(path).observe(self._longest_s)

    def _check_end(self) -> None:
        """A backend may close its side in good order and yet be in the midst of an answer."""
        if self._end and not self._tail.rstrip().endswith(self._end):
            raise BackendDisconnectError(self._upstream.backend, "the instance ended the stream before it was complete")

    async def _break(self, error: BackendError | UnavailableError) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            return
        self._metrics.broken_streams.inc()
        self._record.error = str(error)
        log.warning("stream %s broke after %d bytes: %s", self._record.request_id, self._record.bytes_out, error)
        body = error_for(self._record.path, error.body())
        gap = b"" if self._tail.endswith(b"\n\n") else b"\n\n"
        await self._outlet.write(self._response, gap + b"event: error\ndata: " + body + b"\n\n")
        # No write_eof: without the last chunk the client's HTTP library knows too that this is not the whole.
        self._response.force_close()
        transport.close()
