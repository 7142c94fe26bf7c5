"""How much there is to parse in a body, told before it is parsed."""

from collections.abc import Iterator

from ..errors import InvalidRequestError

# orjson keeps the GIL until it has made all of a document, in a thread too: a second for a few million lists. So many
# take some 30 ms.
CONTAINERS_MAX = 120_000
VALUES_MAX = 1_000_000
_BACKSLASH = ord("\\")


def check_weight(body: bytes) -> None:
    """Raise :class:`InvalidRequestError` for more objects, lists and values than any request is made of.

    Only where the bytes that begin or part them are many is it told which of them stand in strings.
    """
    if len(body) <= CONTAINERS_MAX:  # as most are
        return
    if body.count(b"{") + body.count(b"[") <= CONTAINERS_MAX and body.count(b",") <= VALUES_MAX:
        return
    containers = values = 0
    for start, end in _outside_strings(body):
        containers += body.count(b"{", start, end) + body.count(b"[", start, end)
        values += body.count(b",", start, end)
        if containers > CONTAINERS_MAX:
            raise InvalidRequestError(f"the body: expected at most {CONTAINERS_MAX:,} objects and lists, found more")
        if values > VALUES_MAX:
            raise InvalidRequestError(f"the body: expected at most {VALUES_MAX:,} values, found more")


def _outside_strings(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where what is no string begins and ends. In short steps: another thread may run between two of them."""
    at = 0
    while (quote := body.find(b'"', at)) >= 0:
        yield at, quote
        at = _end_of_string(body, quote + 1)
    yield at, len(body)


def _end_of_string(body: bytes, start: int) -> int:
    """Return where the string that begins at ``start`` is over: after the next quote that is not escaped."""
    end = body.find(b'"', start)
    while end >= 0:
        before = end - 1
        while before >= start and body[before] == _BACKSLASH:
            before -= 1
        if (end - before) % 2:
            return end + 1
        end = body.find(b'"', end + 1)
    return len(body)
