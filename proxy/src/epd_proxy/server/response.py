"""What a handler gives back, and responses as bytes."""

import time
from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus

Headers = list[tuple[str, str]]

_REASONS = {status.value: status.phrase for status in HTTPStatus}
# They have no body, whatever a handler says (RFC 9110, 15.3.5 and 15.4.5).
_BODILESS = frozenset((204, 304))


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
    """Writes responses' heads; remembers the current second's date."""

    def __init__(self) -> None:
        self._second = 0
        self._date = ""

    def write(self, status: int, headers: Headers, framing: str) -> bytes:
        """Return a head. ``framing`` are the lines that say where the body ends, each with its end.

        Raises :class:`ValueError` for what would end a line early. Values that came as other bytes than UTF-8 leave as
        these bytes (``surrogateescape``).
        """
        second = int(time.time())
        if second != self._second:
            self._second, self._date = second, formatdate(second, usegmt=True)
        lines = [f"{name}: {value}\r\n" for name, value in headers]
        text = "".join(lines)
        if text.count("\n") != len(lines) or text.count("\r") != len(lines) or "\0" in text:
            raise ValueError("a header holds a control character")
        head = f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n{text}Date: {self._date}\r\n{framing}\r\n"
        return head.encode("utf-8", "surrogateescape")


def has_body(method: str, status: int) -> bool:
    """Whether the answer to such a request has a body."""
    return method != "HEAD" and status not in _BODILESS
