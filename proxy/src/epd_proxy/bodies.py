"""The clients' bodies: admitted while there is memory for them, and read within a time."""

import asyncio
import time

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from .aside import run_aside
from .config import Limits
from .errors import BodyTooLargeError, BodyTooSlowError, InvalidRequestError, UnavailableError

# A client that sends one byte now and then is never idle, so its average counts too; no network in use is as slow.
_SLOWEST_BYTES_PER_S = 4096


class Share:
    """What one request's body takes of the budget; whatever it grew to is given back at the end of its ``with``."""

    __slots__ = ("_bodies", "size_bytes")

    def __init__(self, bodies: "Bodies") -> None:
        self.size_bytes = 0
        self._bodies = bodies

    def __enter__(self) -> "Share":
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bodies.held_bytes -= self.size_bytes


class Bodies:
    """Reads bodies and keeps the sum of those in memory within ``limits.bodies_bytes``."""

    def __init__(self, limits: Limits, idle_s: float) -> None:
        self._limits = limits
        self._idle_s = idle_s
        self.held_bytes = 0

    def __repr__(self) -> str:
        return f"<Bodies held={self.held_bytes} of {self._limits.bodies_bytes} bytes>"

    def share(self) -> Share:
        """Return a share of the budget to grow in, to be used in a ``with``."""
        return Share(self)

    def check(self, announced_bytes: int) -> None:
        """Raise :class:`BodyTooLargeError`, or :class:`UnavailableError` when there is no room now."""
        self._check(announced_bytes, announced_bytes)

    async def read(self, request: web.Request, share: Share) -> bytes:
        """Read the body into ``share``: all that is announced counts at once, else every byte as it comes.

        Not ``request.read()``: that keeps the body for as long as the request, an answer's whole stream included.

        Raises what :meth:`check` does, :class:`BodyTooSlowError`, and :class:`InvalidRequestError` for broken bodies.
        """
        self._grow(share, request.content_length or 0)
        content = request.content
        if content.is_eof() and content.exception() is None:  # most bodies come along with their heads
            body = content.read_nowait()
            self._grow(share, len(body))
            return body
        pieces: list[bytes] = []
        received_bytes = 0
        started = time.monotonic()
        while not content.at_eof():
            piece = await self._next_piece(request, received_bytes, time.monotonic() - started)
            received_bytes += len(piece)
            self._grow(share, received_bytes)  # a compressed body is more than was announced
            pieces.append(piece)
        return await run_aside(received_bytes, b"".join, pieces)  # which gives up the GIL

    async def _next_piece(self, request: web.Request, received_bytes: int, elapsed_s: float) -> bytes:
        credit_s = self._idle_s + received_bytes / _SLOWEST_BYTES_PER_S - elapsed_s
        try:
            async with asyncio.timeout(min(self._idle_s, credit_s)):
                return await request.content.readany()
        except TimeoutError as error:
            raise BodyTooSlowError(f"the body did not come in time, {received_bytes} bytes of it did") from error
        except (web.RequestPayloadError, BadHttpMessage) as error:
            raise InvalidRequestError(f"the body could not be read: {error}") from error

    def _grow(self, share: Share, size_bytes: int) -> None:
        added_bytes = max(0, size_bytes - share.size_bytes)
        self._check(size_bytes, added_bytes)
        share.size_bytes += added_bytes
        self.held_bytes += added_bytes

    def _check(self, size_bytes: int, added_bytes: int) -> None:
        if size_bytes > self._limits.body_bytes:
            raise BodyTooLargeError(f"the body is over {self._limits.body_bytes} bytes, the most that is taken")
        if added_bytes and self.held_bytes + added_bytes > self._limits.bodies_bytes:
            raise UnavailableError("the bodies of other requests fill the proxy's memory; try again later")
