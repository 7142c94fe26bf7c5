"""What a handler gives back, and responses as bytes."""

import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus

Headers = list[tuple[str, str]]


class Response:
    """A whole answer. The server adds length, date, and what the connection needs."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int = 200, body: bytes = b"", headers: Iterable[tuple[str, str]] = ()) -> None:
        self.status = status
        self.body = body
        self.headers: Headers = list(headers)

    def __repr__(self) -> str:
        return f"<Response {self.status} {len(self.body)} bytes>"


class Heads:
    """Writes responses' heads. ``server`` is what they say of who made them."""

    def __init__(self, server: str) -> None:
        self._server = f"Server: {server}\r\n" if server else ""
        self._second = 0
        self._common = ""
        self._starts = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}

    def write(self, status: int, headers: Headers, framing: str) -> bytes:
        """Return a head. ``framing`` are the lines that say where the body ends, each with its end.

        Raises :class:`ValueError` for what would end a line early. Values that came as other bytes than UTF-8 leave as
        these bytes (``surrogateescape``).
        """
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._common = f"{self._server}Date: {formatdate(second, usegmt=True)}\r\n"
        text = "".join([f"{name}: {value}\r\n" for name, value in headers])
        if text.count("\n") != len(headers) or text.count("\r") != len(headers) or "\0" in text:
            raise ValueError("a header holds a control character")
        start = self._starts.get(status) or f"HTTP/1.1 {status} \r\n"
        return f"{start}{text}{self._common}{framing}\r\n".encode("utf-8", "surrogateescape")
