"""A request to a backend, and its head as bytes."""

import ipaddress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from ..protocol import Headers


class Call(NamedTuple):
    """One request to a backend, whichever instance it goes to. ``first_byte_s`` limits the wait for an answer.

    ``once``: it must not reach an instance twice, so it goes over a new connection, which cannot be stale.
    """

    path: str
    headers: Headers
    first_byte_s: float
    body: bytes | None = None
    method: str = "POST"
    once: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """Where a backend's base URL leads; ``authority`` is what its ``Host`` header says.

    ``is_address``: ``host`` is an address, and there is no name to ask about.
    """

    backend: str
    host: str
    port: int
    tls: bool
    authority: str
    is_address: bool


def parse_target(backend: str) -> Target:
    """Split a base URL that the configuration has checked; an IPv6 literal stands in brackets, a zone is not sent."""
    parts = urlsplit(backend)
    tls = parts.scheme == "https"
    host = parts.hostname or ""
    name, _, _zone = host.partition("%")
    authority = f"[{name}]" if ":" in name else name
    if parts.port:
        authority += f":{parts.port}"
    return Target(backend, host, parts.port or (443 if tls else 80), tls, authority, _is_address(host))


def write_head(call: Call, target: Target) -> bytes:
    """Return the request's head. Raises :class:`ValueError` for what would end a line early, and for ``HEAD``.

    Header values came as bytes in UTF-8 or not (``surrogateescape``) and leave as the same bytes.
    """
    if call.method == "HEAD":
        raise ValueError("an answer to HEAD announces a body that does not come; ask with GET")
    length = "" if call.body is None else f"Content-Length: {len(call.body)}\r\n"
    headers = "".join([f"{name}: {value}\r\n" for name, value in call.headers])
    text = f"{call.method} {call.path} HTTP/1.1\r\nHost: {target.authority}\r\n{headers}{length}\r\n"
    ends = len(call.headers) + (3 if call.body is None else 4)
    if text.count("\n") != ends or text.count("\r") != ends or "\0" in text:
        raise ValueError("a header or the path holds a control character")
    return text.encode("utf-8", "surrogateescape")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
