"""What comes over a client's connection: bytes in whatever pieces, made requests of."""

import asyncio
from abc import ABC, abstractmethod

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

from .request import Request
from .response import Headers

# Of a head, or of trailers, which nobody reads.
_HEAD_MAX_BYTES = 64 * 1024
_HEADERS_MAX = 256


class RequestReader(asyncio.Protocol, ABC):
    """The reading half of a :class:`ClientConnection`. ``reading_paused``: the client has to wait.

    ``last``: no further request is taken. ``lingering``: what comes is dropped.
    """

    __deletable__ = ("_parser",)  # compiled classes let go of no other attribute

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reading_paused = False
        self.last = False
        self.lingering = False
        self._parser = HttpRequestParser(self)
        self._target = b""
        self._headers: Headers = []
        self._unused_bytes = 0  # that came since a request began, or a piece of its body
        self._used = False
        self._within_head = False
        self._coming: Request | None = None  # of which the body is on its way
        self._bodiless: Request | None = None  # of which the parser leaves out the body
        self._resumed: Request | None = None

    # What the other half does about it.

    @abstractmethod
    def begin_head(self) -> None:
        """A request begins. Raises :class:`ValueError` when there are too many."""

    @abstractmethod
    def take_in(self, request: Request) -> None:
        """A request is here, its body may not be."""

    @abstractmethod
    def refuse(self, status: int, why: str) -> None:
        """What comes cannot be read."""

    @abstractmethod
    def end_lingering(self) -> None:
        """The client has sent all of what nobody reads."""

    # What the transport calls.

    def data_received(self, data: bytes) -> None:
        """Parse what came; a whole head starts its handler."""
        if self.last and self._coming is None:
            return  # of a further request, which is not answered
        self._used = False
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._read_on(data[upgrade.args[0] :])
        except HttpParserError as error:
            self.refuse(400, f"the request is not valid HTTP: {error}")
        else:
            self._unused_bytes = 0 if self._used else self._unused_bytes + len(data)
            if self._unused_bytes > _HEAD_MAX_BYTES:
                self.refuse(431, "the request's head, or what follows its body, is too large")

    # What the parser calls.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._unused_bytes = 0
        if self._resumed:
            return
        self.begin_head()
        self._target, self._headers, self._within_head = b"", [], True

    def on_url(self, part: bytes) -> None:
        """Note the target, which comes in parts where it is long."""
        self._target += part

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; trailers are dropped."""
        if self._within_head:
            self._headers.append((name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")))

    def on_headers_complete(self) -> None:
        """Have the request handled, now or after those before it."""
        self._used = True
        if self._resumed:
            self._coming, self._resumed = self._resumed, None
            return
        if len(self._headers) > _HEADERS_MAX:
            raise ValueError("too many headers")
        if b"#" in self._target:  # an instance leaves out what follows, and would serve another path than was looked at
            raise ValueError("a fragment in the request's target")
        parser = self._parser
        self._within_head = False
        request = Request(
            self,  # type: ignore[arg-type] # which is a ClientConnection
            parser.get_method().decode(), self._target.decode("ascii", "replace"), self._headers,
            version=parser.get_http_version(), keep_alive=parser.should_keep_alive(),
        )  # fmt: skip
        if not _names_one_host(request):
            raise ValueError("expected one Host header")
        self._coming = request
        if parser.should_upgrade():
            self._note_upgrade(request)
        self.take_in(request)

    def on_body(self, piece: bytes) -> None:
        """Give a piece to the request."""
        self._used = True
        if self._coming and not self.lingering and not self._coming.add(piece):
            self.pause_reading()

    def on_message_complete(self) -> None:
        """The request is all here."""
        self._used = True
        if self._coming:
            self._coming.end()
            self._coming = None
        if self.lingering:
            self.end_lingering()

    # What either half does.

    def resume_reading(self) -> None:
        """There is room again."""
        if self.reading_paused:
            self.reading_paused = False
            if self.transport and not self.transport.is_closing():
                self.transport.resume_reading()

    def pause_reading(self) -> None:
        """There is no room for more."""
        if self.transport and not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()

    # Inside.

    def _note_upgrade(self, request: Request) -> None:
        if request.method == "CONNECT":
            self.last = True
        elif request.content_length or "transfer-encoding" in request.headers:
            self._bodiless, self._coming = request, None

    def _read_on(self, rest: bytes) -> None:
        """Read ``rest`` as what it is: another protocol was offered, but none is spoken here (RFC 9110, 7.8).

        httptools takes even the body for a part of that; Java's client offers HTTP/2 with every request.
        """
        self._parser = HttpRequestParser(self)
        request, self._bodiless = self._bodiless, None
        if request:
            self._resumed = request
            name = "transfer-encoding" if "transfer-encoding" in request.headers else "content-length"
            rest = f"POST / HTTP/1.1\r\n{name}: {request.headers[name]}\r\n\r\n".encode() + rest
        if rest:
            self.data_received(rest)


def _names_one_host(request: Request) -> bool:
    """Whether it does, where it has to (RFC 9112, 3.2): of two, the next one may take the other."""
    if request.version != "1.1":
        return True
    lines, headers = request.header_lines, request.headers
    if len(lines) == len(headers):
        return "host" in headers
    return sum(name.lower() == "host" for name, _ in lines) == 1
