"""The only module that opens sockets to backends; foreign exceptions end here and become those of ``errors``."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from .config import Timeouts
from .errors import (
    BackendConnectError,
    BackendConnectTimeoutError,
    BackendDisconnectError,
    BackendError,
    BackendProtocolError,
    BackendTimeoutError,
)
from .protocol import Headers

# uvicorn, and so vLLM, closes idle connections after 5 s. Stop using ours before that, or a request meets a closing
# one.
_KEEP_ALIVE_S = 3.0
_STALE_WITHIN_S = 1.0
# aiohttp warns of larger plain bytes since it would write them in one go; a BytesIO is written in pieces.
_PIECEWISE_FROM_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a backend, whichever instance it goes to. ``first_byte_s`` limits the wait for an answer.

    ``once``: it must not reach an instance twice, so it goes over a new connection, which cannot be stale.
    """

    path: str
    headers: Headers
    first_byte_s: float
    body: bytes | None = None
    method: str = "POST"
    once: bool = False


class UpstreamResponse:
    """A backend's answer of which head and first bytes are here. Whoever holds it closes it."""

    def __init__(self, backend: str, response: aiohttp.ClientResponse, idle_s: float) -> None:
        self.backend = backend
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self.content_type = response.headers.get("Content-Type", "")
        self.first = b""
        self._response = response
        self._idle_s = idle_s

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is a stream of server-sent events."""
        return self.content_type.lower().startswith("text/event-stream")

    async def read_first(self) -> None:
        """Wait for the first bytes: until they are here, another instance can still be asked."""
        self.first = await self._response.content.readany()

    async def read_all(self, size_max_bytes: int) -> bytes:
        """Return the whole body. Raises :class:`BackendError` when it is cut short or over ``size_max_bytes``."""
        pieces, size_bytes = [self.first], len(self.first)
        async for piece in self.chunks():
            size_bytes += len(piece)
            if size_bytes > size_max_bytes:
                raise BackendProtocolError(self.backend, f"the instance's answer is over {size_max_bytes} bytes")
            pieces.append(piece)
        return b"".join(pieces) if len(pieces) > 1 else self.first

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the bytes after ``first`` as they arrive, never re-cut. Raises :class:`BackendError`."""
        content = self._response.content
        try:
            while not content.at_eof():
                async with asyncio.timeout(self._idle_s):
                    piece = await content.readany()
                if piece:
                    yield piece
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _translate(self.backend, error) from error

    def close(self) -> None:
        """Free the connection: for reuse when the body was read to its end, else closed, which aborts the request."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class Upstream:
    """Sends requests to backends over kept connections."""

    def __init__(self, timeouts: Timeouts, tls: ssl.SSLContext | None = None) -> None:
        """``tls`` is for instances whose URL begins with https; the system's CAs by default."""
        self._timeouts = timeouts
        self._tls: ssl.SSLContext | bool = tls or True
        self._kept: aiohttp.ClientSession | None = None
        self._new: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Open the connection pools; needs a running loop."""
        self._kept = self._open_session(aiohttp.TCPConnector(limit=0, ssl=self._tls, keepalive_timeout=_KEEP_ALIVE_S))
        self._new = self._open_session(aiohttp.TCPConnector(limit=0, ssl=self._tls, force_close=True))

    async def close(self) -> None:
        """Close every connection."""
        for session in (self._kept, self._new):
            if session:
                await session.close()

    def _open_session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeouts.connect_s),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            trace_configs=[trace],
        )

    async def send(self, backend: str, call: Call) -> UpstreamResponse:
        """Send ``call`` to ``backend`` and return when its first bytes are here. Raises :class:`BackendError`."""
        try:
            async with asyncio.timeout(call.first_byte_s):
                return await self._send(backend, call)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _translate(backend, error) from error

    async def _send(self, backend: str, call: Call) -> UpstreamResponse:
        connection = SimpleNamespace(reused=False)
        started = time.monotonic()
        try:
            return await self._send_once(backend, call, connection)
        except (aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError):
            # Most likely the instance closed a kept connection just as we took it, and never saw the request. One that
            # dies of the request takes longer, or does so again on a new connection.
            if not connection.reused or time.monotonic() - started > _STALE_WITHIN_S:
                raise
        return await self._send_once(backend, call, SimpleNamespace(reused=False))

    async def _send_once(self, backend: str, call: Call, connection: SimpleNamespace) -> UpstreamResponse:
        session = self._new if call.once else self._kept
        if session is None:
            raise RuntimeError("Upstream.start() was not called")
        body = call.body
        response = await session.request(
            call.method,
            URL(backend + call.path, encoded=True),
            data=BytesIO(body) if body and len(body) > _PIECEWISE_FROM_BYTES else body,
            headers=CIMultiDict(call.headers),
            allow_redirects=False,
            trace_request_ctx=connection,
        )
        answer = UpstreamResponse(backend, response, self._timeouts.idle_s)
        try:
            await answer.read_first()
        except BaseException:
            response.close()
            raise
        return answer


async def _note_reuse(_session: aiohttp.ClientSession, context: SimpleNamespace, _parameters: object) -> None:
    context.trace_request_ctx.reused = True


def _translate(backend: str, error: Exception) -> BackendError:
    """Name no address in the message: clients read it. The log line has it."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return BackendConnectTimeoutError(backend, "the instance cannot be reached in time")
    if isinstance(error, aiohttp.ClientConnectorError):
        return BackendConnectError(backend, "the instance cannot be reached")
    if isinstance(error, TimeoutError):
        return BackendTimeoutError(backend, "the instance did not answer in time")
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.InvalidURL):
        return BackendProtocolError(backend, "the instance's answer is not valid HTTP")
    return BackendDisconnectError(backend, "the instance's connection broke before its answer was complete")
