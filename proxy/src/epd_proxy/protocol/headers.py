"""Which headers travel: end-to-end ones do, the connection's own do not (RFC 9110, 7.6.1)."""

import re
import uuid
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
    return _filtered(headers.items(), _NOT_FORWARDED | _named_by_connection(headers))


def returned_headers(headers: Mapping[str, str]) -> Headers:
    """Return what of a backend's headers goes to the client."""
    return _filtered(headers.items(), _NOT_RETURNED | _named_by_connection(headers))


def choose_request_id(headers: Mapping[str, str]) -> str:
    """Return the client's ``X-Request-Id`` where it is 1 to 200 visible ASCII characters, else a new one."""
    given = headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def tenant_of(headers: Mapping[str, str], names: Iterable[str]) -> str:
    """Return who sends, told by the headers of these ``names``; empty when there is none of them."""
    return "\n".join(f"{name}:{value}" for name in names if (value := headers.get(name)))


def trace_id(headers: Mapping[str, str]) -> str:
    """Return the trace id of a W3C ``traceparent`` header, empty when there is none."""
    match = _TRACE_PARENT.fullmatch(headers.get("traceparent", ""))
    return match[1] if match else ""


def _named_by_connection(headers: Mapping[str, str]) -> frozenset[str]:
    named = headers.get("Connection")
    return frozenset(name.strip().lower() for name in named.split(",")) if named else frozenset()


def _filtered(items: Iterable[tuple[str, str]], dropped: frozenset[str]) -> Headers:
    return [(name, value) for name, value in items if name.lower() not in dropped]
