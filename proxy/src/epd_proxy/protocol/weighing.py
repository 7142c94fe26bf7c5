"""How much there is to parse in a body, told before it is parsed."""

from collections.abc import Iterator

from ..errors import InvalidRequestError

# orjson keeps the GIL until it has made all of a document, in a thread too, and what it makes takes time by its kind.
# In units of 50 ns: a number or constant 1, a string 2, an object or list 3 more, a member 6 more, as its key is new
# every time at the worst. So many units take some 50 ms on a slow machine.
WEIGHT_MAX = 1_000_000
_UNITS = {b"{": 3, b"[": 3, b":": 6, b",": 1}
_STRING_UNITS = 1
# What weighs most for its length are objects in each other, `{"":{"":…}}`, with 10 units for 5 bytes.
LIGHT_BYTES = WEIGHT_MAX // 2
_STRUCTURE = b'"' + b"".join(_UNITS)
_ALL_ELSE = bytes(set(range(256)) - set(_STRUCTURE))
# One call takes all of it without letting another thread run.
_STEP_BYTES = 1024 * 1024
_BACKSLASH = ord("\\")


def check_weight(body: bytes) -> None:
    """Raise :class:`InvalidRequestError` for more objects, lists and values than any request is made of.

    Short bodies cannot hold so much. Of longer ones all structure is weighed, wherever it stands, in one pass (0.5 ms a
    MiB); only where that is too much is it told which of it stands in strings.
    """
    if len(body) <= LIGHT_BYTES or _weigh_all(body) <= WEIGHT_MAX or weigh(body) <= WEIGHT_MAX:
        return
    raise InvalidRequestError("the body: expected at most 100,000 members of objects, or a million numbers, found more")


def weigh(body: bytes) -> int:
    """Return the weight of ``body``; where it is over :data:`WEIGHT_MAX` no more than that."""
    weight = 0
    for start, end in _outside_strings(body):
        weight += _weigh(body, start, end) + _STRING_UNITS
        if weight > WEIGHT_MAX:
            break
    return weight


def _weigh_all(body: bytes) -> int:
    """Return at least what ``body`` weighs: quotes and structure within strings count too."""
    weight = 0
    for start in range(0, len(body), _STEP_BYTES):
        kept = body[start : start + _STEP_BYTES].translate(None, _ALL_ELSE)
        weight += _weigh(kept, 0, len(kept)) + (kept.count(b'"') + 1) // 2 * _STRING_UNITS
        if weight > WEIGHT_MAX:
            break
    return weight


def _weigh(body: bytes, start: int, end: int) -> int:
    return sum(units * body.count(mark, start, end) for mark, units in _UNITS.items())


def _outside_strings(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where what is no string begins and ends. In short steps: another thread may run between two of them."""
    at = 0
    while at < len(body):
        quote = body.find(b'"', at)
        end = quote if quote >= 0 else len(body)
        yield from ((start, min(end, start + _STEP_BYTES)) for start in range(at, end, _STEP_BYTES))
        at = _end_of_string(body, quote + 1) if quote >= 0 else end


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
