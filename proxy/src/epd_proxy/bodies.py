"""The clients' bodies: admitted while there is memory for them, and read within a time."""

import asyncio
import time
import zlib
from collections.abc import Iterator

from .aside import run_aside
from .config import Limits
from .errors import BodyTooLargeError, BodyTooSlowError, InvalidRequestError, UnavailableError
from .server import Request

# A client that sends one byte now and then is never idle, so its average counts too; no network in use is as slow.
_SLOWEST_BYTES_PER_S = 4096
# So much of an announced body is waited for at once.
_PIECE_BYTES = 256 * 1024
# Beyond it a block is one of its own for malloc (see memory).
_LARGE_BYTES = 1024 * 1024
# So much is decompressed at once: it takes about a millisecond.
_INFLATED_BYTES = 256 * 1024
# zlib's window bits: with gzip's header, and with deflate's.
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


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

    async def read(self, request: Request, share: Share) -> bytes:
        """Read the body into ``share``: all that is announced counts at once, else every byte as it comes.

        Raises :class:`BodyTooLargeError`, :class:`UnavailableError` when there is no room now,
        :class:`BodyTooSlowError`, and :class:`InvalidRequestError` for broken bodies.
        """
        coding = request.headers.get("content-encoding")
        if request.complete and not coding:  # most bodies come along with their heads
            body = request.take()
            self._grow(share, len(body))
            return body
        self._grow(share, request.content_length)
        if coding and coding.lower() != "identity":
            return await self._read_compressed(request, share, coding.lower())
        gathered = _Gathered()
        started = time.monotonic()
        while piece := await self._next_piece(request, gathered.size_bytes, started):
            self._grow(share, gathered.size_bytes + len(piece))
            gathered.add(piece)
        return await gathered.whole()

    async def _read_compressed(self, request: Request, share: Share, coding: str) -> bytes:
        if coding not in _WINDOWS:
            raise InvalidRequestError(f"Content-Encoding: expected gzip or deflate, found {coding[:32]}")
        gathered, received_bytes = _Gathered(), 0
        started, inflating = time.monotonic(), zlib.decompressobj(_WINDOWS[coding])
        try:
            while piece := await self._next_piece(request, received_bytes, started):
                received_bytes += len(piece)
                for inflated in _inflate(inflating, piece):
                    self._grow(share, gathered.size_bytes + len(inflated))
                    gathered.add(inflated)
                    await asyncio.sleep(0)
        except zlib.error as error:
            raise InvalidRequestError(f"the body is not valid {coding}: {error}") from error
        if not inflating.eof:
            raise InvalidRequestError(f"the body is not valid {coding}: it ends too soon")
        return await gathered.whole()

    async def _next_piece(self, request: Request, received_bytes: int, started: float) -> bytes:
        credit_s = self._idle_s + received_bytes / _SLOWEST_BYTES_PER_S - (time.monotonic() - started)
        least_bytes = max(1, min(request.content_length - received_bytes, _PIECE_BYTES))
        try:
            async with asyncio.timeout(min(self._idle_s, credit_s)):
                return await request.more(least_bytes)
        except TimeoutError as error:
            if credit_s > self._idle_s and (piece := request.take()):
                return piece  # not so much as was waited for, but the client is not idle
            raise BodyTooSlowError(f"the body did not come in time, {received_bytes} bytes of it did") from error

    def _grow(self, share: Share, size_bytes: int) -> None:
        added_bytes = size_bytes - share.size_bytes
        if size_bytes > self._limits.body_bytes:
            raise BodyTooLargeError(f"the body is over {self._limits.body_bytes} bytes, the most that is taken")
        if added_bytes <= 0:
            return
        if self.held_bytes + added_bytes > self._limits.bodies_bytes:
            raise UnavailableError("the bodies of other requests fill the proxy's memory; try again later")
        share.size_bytes = size_bytes
        self.held_bytes += added_bytes


class _Gathered:
    """The pieces of a body. Of a large one they are put together as they come: thousands of them, freed at once, would
    leave the heap full of holes.
    """

    __slots__ = ("_large", "_pieces", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self._pieces: list[bytes] = []
        self._large: bytearray | None = None

    def add(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if self._large is not None:
            self._large += piece
        else:
            self._pieces.append(piece)
            if self.size_bytes > _LARGE_BYTES:
                self._large = bytearray().join(self._pieces)
                self._pieces.clear()

    async def whole(self) -> bytes:
        if self._large is None:
            return b"".join(self._pieces)
        return await run_aside(self.size_bytes, b"".join, (memoryview(self._large), b""))  # which gives up the GIL


def _inflate(inflating: "zlib._Decompress", piece: bytes) -> Iterator[bytes]:
    """Yield what ``piece`` grows to, in steps: a small one may grow to a thousand times its size."""
    while piece and not inflating.eof:
        yield inflating.decompress(piece, _INFLATED_BYTES)
        piece = inflating.unconsumed_tail
