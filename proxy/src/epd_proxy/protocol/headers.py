"""Which headers travel: end-to-end ones do, the connection's own do not (RFC 9110, 7.6.1)."""

import random
import re
from collections.abc import Iterable, Mapping

Headers = list[tuple[str, str]]
"""Names and values as they came, in order. Where they are a mapping, its names are of lower case."""

_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
     "transfer-encoding", "upgrade")
)  # fmt: skip
# Set anew for each hop; the body arrives here decoded and is sent decoded; the ranks are the balancer's to choose.
_NOT_FORWARDED = _HOP_BY_HOP | {
    "host", "content-length", "content-encoding", "accept-encoding", "expect", "x-request-id", "x-data-parallel-rank",
    "origin",
}  # fmt: skip
# Which pages may read the answer is this proxy's to say: vLLM allows all of them by default.
_NOT_RETURNED = frozenset(name.encode() for name in _HOP_BY_HOP) | {
    b"content-length", b"date", b"server", b"x-request-id", b"access-control-allow-origin",
    b"access-control-allow-credentials", b"access-control-expose-headers", b"vary",
}  # fmt: skip

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")


def forwarded_headers(headers: Headers, connection: str = "") -> Headers:
    """Return what of the client's headers goes to every stage; the request id is added per stage.

    ``connection`` is the value of the header of this name, which may name others.
    """
    dropped = _NOT_FORWARDED
    if connection and connection.lower() not in ("keep-alive", "close"):
        dropped = dropped.union(name.strip().lower() for name in connection.split(","))
    return [header for header in headers if header[0].lower() not in dropped]


def returned_headers(headers: list[tuple[bytes, bytes]]) -> Headers:
    """Return what of a backend's headers goes to the client; most does not, so only what does is decoded.

    Header values are bytes in UTF-8 or not (``surrogateescape``), and leave as the same bytes.
    """
    kept, dropped = [], _NOT_RETURNED
    for name, value in headers:
        lower = name.lower()
        if lower not in dropped:
            kept.append((name.decode("ascii", "surrogateescape"), value.decode("utf-8", "surrogateescape")))
        elif lower == b"connection" and value.lower() not in (b"keep-alive", b"close"):
            named = {each.strip().lower() for each in value.split(b",")}
            kept = [(name, value) for name, value in kept if name.lower().encode() not in named]
            dropped |= named
    return kept


def choose_request_id(headers: Mapping[str, str]) -> str:
    """Return the client's ``X-Request-Id`` where it is 1 to 200 visible ASCII characters, else a new one.

    Random, not secret: who names a request gains nothing by it, since clients may choose the name themselves.
    """
    given = headers.get("x-request-id")
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return random.getrandbits(128).to_bytes(16, "big").hex()  # a third of the time of a format


def tenant_of(headers: Mapping[str, str], names: Iterable[str]) -> str:
    """Return who sends, told by the headers of these ``names``; empty when there is none of them."""
    return "\n".join([f"{name}:{value}" for name in names if (value := headers.get(name))])


def trace_id(headers: Mapping[str, str]) -> str:
    """Return the trace id of a W3C ``traceparent`` header, empty when there is none."""
    parent = headers.get("traceparent")
    match = _TRACE_PARENT.fullmatch(parent) if parent else None
    return match[1] if match else ""
