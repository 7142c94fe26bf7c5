"""Documents to JSON, long strings in slices, so that a thread that does it lets the event loop run."""

import os
from typing import Any

import orjson

from ..errors import InvalidRequestError
from .inline import Inline

_SLICE = 1024 * 1024
# A content part's URL is at messages[].content[].image_url.url; deeper nesting is left to orjson.
_DEPTH_MAX = 8


def write_json(document: dict[str, Any], inline: Inline | None = None) -> bytes:
    """Return what ``orjson.dumps`` does, the contents of ``inline`` in their places.

    orjson keeps the GIL until it is done, about 0.6 ms a MiB, and a picture is one string: in a thread too it would
    hold up the event loop for all of it.

    Raises :class:`InvalidRequestError` for a document nested more than 254 deep: orjson reads up to 1024, but does not
    write them.
    """
    long = list[str]()
    mark = os.urandom(16).hex()
    written = _dump(_cut_out(document, mark, long, _DEPTH_MAX))
    if long:
        written = _fill_in(written, mark, long)
    return inline.restore_in(written) if inline else written


def _fill_in(outline: bytes, mark: str, long: list[str]) -> bytes:
    first, *gaps = outline.split(b'"%s"' % mark.encode())
    pieces = [first]
    for text, gap in zip(long, gaps, strict=True):
        slices = (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
        pieces += [b'"', *(orjson.dumps(each)[1:-1] for each in slices), b'"' + gap]
    return b"".join(pieces)  # gives up the GIL where it is long


def with_member(body: bytes, name: str, value: Any, *, first: bool = False) -> bytes:
    """Return the JSON object that ``body`` is, byte for byte, and one more member at its end.

    ``first``: it has none yet. Copied in slices and joined without the GIL, for the same reason as above.
    """
    end = body.rindex(b"}")
    slices = (body[start : min(end, start + _SLICE)] for start in range(0, end, _SLICE))
    return b"".join([*slices, b"" if first else b",", orjson.dumps(name), b":", orjson.dumps(value), b"}"])


def write_sorted(value: Any) -> bytes:
    """Return the same bytes for the same value. Raises as :func:`write_json` does."""
    return _dump(value, orjson.OPT_SORT_KEYS)


def _dump(value: Any, option: int = 0) -> bytes:
    try:
        return orjson.dumps(value, option=option)
    except orjson.JSONEncodeError as error:
        raise InvalidRequestError("the body: expected objects and lists at most 254 deep in each other") from error


def _cut_out(value: Any, mark: str, long: list[str], depth: int) -> Any:
    """Return ``value`` with ``mark`` for its long strings, which are added to ``long`` in order."""
    if isinstance(value, str) and len(value) > _SLICE:
        long.append(value)
        return mark
    if isinstance(value, dict) and depth:
        return {key: _cut_out(each, mark, long, depth - 1) for key, each in value.items()}
    # Not into lists of numbers: a prompt of token ids has many.
    if isinstance(value, list) and depth and value and isinstance(value[0], dict | list | str):
        return [_cut_out(each, mark, long, depth - 1) for each in value]
    return value
