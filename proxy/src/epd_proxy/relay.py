"""A backend's answer to the client's response: bytes in, bytes out.

:class:`Answer` owns the lease and the connection behind it; ``Answer.close`` is the one place that gives both back.
"""

import asyncio
import contextlib
import logging
import time

from .access import AccessRecord
from .errors import BackendDisconnectError, BackendError, UnavailableError
from .metrics import Metrics
from .pool import Lease
from .protocol import Headers, error_for, returned_headers
from .server import Request, Response, Stream
from .tracing import StageSpan
from .upstream import UpstreamResponse

log = logging.getLogger(__name__)

# A whole answer of this size is left to the transport; a larger one is written as the client takes it.
_PIECE_BYTES = 64 * 1024


class Answer:
    """A backend's answer and the lease it runs on. Closing twice is harmless."""

    __slots__ = ("lease", "response", "span", "whole")

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
    request: Request,
    record: AccessRecord,
    metrics: Metrics,
    *,
    write_idle_s: float,
    stream_end: bytes = b"",
) -> Response | None:
    """Send ``answer`` to the client, or return what is to be sent, and close it, whatever happens.

    ``stream_end`` is what a complete event stream ends with. After the first byte a failure is told as an SSE ``error``
    event, and the connection is closed. A client that takes too little within ``write_idle_s`` is cut off.
    """
    try:
        upstream, whole = answer.response, answer.whole
        if upstream is None:
            raise RuntimeError("the answer was not opened")
        record.status = upstream.status
        headers = returned_headers(upstream.headers)
        headers.append(("X-Request-Id", record.request_id))
        if whole is None and request.method != "HEAD":
            events = _Events(upstream, request, headers, record, metrics=metrics, write_idle_s=write_idle_s,
                             end=stream_end)  # fmt: skip
            await events.run()
    finally:
        answer.close()  # a whole one too: the instance is done, and how long the client takes is no load of its
    if whole is None and request.method != "HEAD":
        return None
    whole = whole or b""
    if not record.first_byte_s:
        record.first_byte_s = record.elapsed_s()
    if len(whole) <= _PIECE_BYTES or request.method == "HEAD":
        record.bytes_out = len(whole)
        return Response(upstream.status, whole, headers)
    await _send_large(whole, request.stream(upstream.status, headers, len(whole)), record, write_idle_s)
    return None


async def _send_large(body: bytes, stream: Stream, record: AccessRecord, write_idle_s: float) -> None:
    for start in range(0, len(body), _PIECE_BYTES):
        piece = body[start : start + _PIECE_BYTES]
        record.bytes_out += len(piece)
        stream.write(piece)
        await _drained(stream, record, write_idle_s)
    stream.end()


async def _drained(stream: Stream, record: AccessRecord, idle_s: float) -> None:
    try:
        await stream.drained(idle_s)
    except ConnectionError as error:
        record.error = str(error)
        raise


class _Events:
    """One event stream on its way to the client."""

    def __init__(self, upstream: UpstreamResponse, request: Request, headers: Headers, record: AccessRecord,
                 *, metrics: Metrics, write_idle_s: float, end: bytes) -> None:  # fmt: skip
        self._upstream = upstream
        self._route = request.route
        self._record = record
        self._metrics = metrics
        self._write_idle_s = write_idle_s
        self._end = end
        self._stream = request.stream(upstream.status, headers)
        self._tail = b""
        self._pieces = 0
        self._came = 0.0
        self._longest_s = 0.0

    async def run(self) -> None:
        """Relay until the end; a failure of the backend becomes an event, the client's leaving is raised."""
        self._record.first_byte_s = self._record.elapsed_s()
        try:
            if not self._write(self._upstream.first):
                await self._drained()
            last = await self._upstream.pump(self._write, self._drained)
            if last:
                self._note(last)
            if self._is_cut_short():
                if last and not self._stream.write(last):
                    await self._drained()
                message = "the instance ended the stream before it was complete"
                raise BackendDisconnectError(self._upstream.backend, message)
        except BackendError as error:
            self._break(error)
            return
        except asyncio.CancelledError:
            # Either the client left, then nobody reads this, or the proxy is shutting down.
            with contextlib.suppress(ConnectionError):
                self._break(UnavailableError("the proxy was stopped before the answer was complete"))
            raise
        if not self._stream.end(last):
            try:
                await self._drained()
            except asyncio.CancelledError:
                self._stream.break_off()  # without an event, as the end was written, which still goes out
                raise
        self._count()

    def _write(self, piece: bytes) -> bool:
        """Write a piece and note when it came. Returns False when the client has enough for now, or is gone.

        Called for every token of every stream, from within the reading of the backend's connection.
        """
        self._note(piece)
        return self._stream.write(piece)

    def _note(self, piece: bytes) -> None:
        self._record.bytes_out += len(piece)
        self._tail = piece if len(piece) >= 32 else (self._tail + piece)[-32:]
        came = time.monotonic()
        if self._pieces and came - self._came > self._longest_s:
            self._longest_s = came - self._came
        self._pieces += 1
        self._came = came

    async def _drained(self) -> None:
        await _drained(self._stream, self._record, self._write_idle_s)

    def _count(self) -> None:
        """Count how evenly the events came: a piece is one of them, as long as they are taken as they come."""
        route, record = self._route, self._record  # not the path itself: clients choose that
        self._metrics.first_token_seconds[route,].observe(record.first_byte_s)
        if self._pieces > 1:
            mean_s = (self._came - record.started - record.first_byte_s) / (self._pieces - 1)
            self._metrics.token_seconds[route,].observe(max(0.0, mean_s))
            self._metrics.token_seconds_max[route,].observe(self._longest_s)

    def _is_cut_short(self) -> bool:
        """A backend may close its side in good order and yet be in the midst of an answer."""
        return bool(self._end) and not self._tail.rstrip().endswith(self._end)

    def _break(self, error: BackendError | UnavailableError) -> None:
        if self._stream.closed:
            return
        self._metrics.broken_streams.inc()
        self._record.error = str(error)
        log.warning("stream %s broke after %d bytes: %s", self._record.request_id, self._record.bytes_out, error)
        body = error_for(self._record.path, error.body())
        gap = b"" if self._tail.endswith(b"\n\n") else b"\n\n"
        event = gap + b"event: error\ndata: " + body + b"\n\n"
        self._record.bytes_out += len(event)
        self._stream.write(event)
        # No end: without the last chunk the client's HTTP library knows too that this is not the whole.
        self._stream.break_off()
