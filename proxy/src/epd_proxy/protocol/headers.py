"""Which headers travel: end-to-end ones do, the connection's own do not (RFC 9110, 7.6.1)."""

import random
import re
from collections.abc import Iterable, Mapping

Headers = list[tuple[str, str]]

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
_NOT_RETURNED = _HOP_BY_HOP | {
    "content-length", "date", "server", "x-request-id", "access-control-allow-origin",
    "access-control-allow-credentials", "access-control-expose-headers", "vary",
}  # fmt: skip

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,200}")
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")


def forwarded_headers(headers: Mapping[str, str]) -> Headers:
    """Return what of the client's headers goes to every stage; the request id is added per stage."""
    return _filtered(headers, _NOT_FORWARDED)


def returned_headers(headers: Mapping[str, str]) -> Headers:
    """Return what of a backend's headers goes to the client."""
    return _filtered(headers, _NOT_RETURNED)


def choose_request_id(headers: Mapping[str, str]) -> str:
    """Return the client's ``X-Request-Id`` where it is 1 to 200 visible ASCII characters, else a new one.

    Random, not secret: who names a request gains nothing by it, since clients may choose the name themselves.
    """
    given = headers.get("X-Request-Id")
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return f"{random.getrandbits(128):032x}"


def tenant_of(headers: Mapping[str, str], names: Iterable[str]) -> str:
    """Return who sends, told by the headers of these ``names``; empty when there is none of them."""
    return "\n".join(f"{name}:{value}" for name in names if (value := headers.get(name)))


def trace_id(headers: Mapping[str, str]) -> str:
    """Return the trace id of a W3C ``traceparent`` header, empty when there is none."""
    parent = headers.get("traceparent")
    match = _TRACE_PARENT.fullmatch(parent) if parent else None
    return match[1] if match else ""


def _filtered(headers: Mapping[str, str], dropped: frozenset[str]) -> Headers:
    named = headers.get("Connection")
    if named:
        dropped = dropped.union(name.strip().lower() for name in named.split(","))
    return [(name, value) for name, value in headers.items() if name.lower() not in dropped]
