"""Content within a body, kept out of the JSON parser: one picture is most of its request, and JSON needs none of it.

A body of 230 kB takes 0.3 ms to be weighed and parsed, and none of it tells more than that the picture is there.
"""

import os
from collections.abc import Iterator

_SIGN = b";base64,"
_START = b'"data:'
# As long as a media type may be, the start included.
_HEAD_MAX_BYTES = 128
# Shorter ones are as well parsed.
_SIZE_MIN_BYTES = 4 * 1024
_SLICE_BYTES = 1024 * 1024
_BACKSLASH = ord("\\")


class CutWronglyError(Exception):
    """The body has to be read as it is."""


class Inline:
    """The contents that were cut out of a body, by the marks that stand in their places.

    Nobody can tell a mark before, so what looks like one is one. ``unchecked`` counts those that may not be base64.
    """

    __slots__ = ("_checked", "_contents", "_mark")

    def __init__(self) -> None:
        self._mark = os.urandom(16).hex() + "-"
        self._contents: dict[str, memoryview] = {}
        self._checked: set[str] = set()

    def __repr__(self) -> str:
        return f"<Inline {len(self._contents)} unchecked={self.unchecked}>"

    @property
    def unchecked(self) -> int:
        """Number of contents of which nobody has said that they are base64."""
        return len(self._contents) - len(self._checked)

    def put(self, content: memoryview) -> bytes:
        """Take in a content; returns its mark."""
        mark = f"{self._mark}{len(self._contents)}"
        self._contents[mark] = content
        return mark.encode()

    def find(self, mark: str) -> memoryview | None:
        """Return the content in whose place ``mark`` is, None for any other text."""
        return self._contents.get(mark)

    def note_checked(self, mark: str) -> None:
        """Note that the content of ``mark`` is base64."""
        self._checked.add(mark)

    def restore_in(self, outline: bytes) -> bytes:
        """Return ``outline`` with the contents in the places of their marks."""
        # To join anything but bytes keeps the GIL, and so does making bytes of it: long contents are taken in slices.
        long = sum(map(len, self._contents.values())) > _SLICE_BYTES
        first, *rest = outline.split(self._mark.encode())
        pieces: list[bytes | memoryview] = [first]
        for gap in rest:  # each begins with a mark's number, and the quote behind it
            number, quote, tail = gap.partition(b'"')
            content = self._contents[f"{self._mark}{number.decode()}"]
            pieces += _slices(content) if long else (content,)
            pieces += (quote, tail)
        return b"".join(pieces)


def cut_out(body: bytes) -> tuple[bytes, Inline | None]:
    """Return ``body`` with marks for the base64 of its long data URLs, and what they stand for; None where none is.

    What is cut out has no quote and no backslash in it, and stands right behind ``"data:`` and a media type, so that
    the outline is JSON if ``body`` is. The other way round that is only so if the contents are base64: where one was
    left unchecked the body has to be read as it is.
    """
    at = body.find(_SIGN)
    if at < 0:
        return body, None
    inline, pieces, done = Inline(), list[bytes | memoryview](), 0
    view = memoryview(body)
    while at >= 0:
        start = at + len(_SIGN)
        end = body.find(b'"', start)
        if end < 0:
            break
        if end - start >= _SIZE_MIN_BYTES and _is_data_url(body, at, done) and body.find(b"\\", start, end) < 0:
            pieces += (view[done:start], inline.put(view[start:end]))
            done = end
        at = body.find(_SIGN, end)
    if not pieces:
        return body, None
    return b"".join((*pieces, view[done:])), inline


def _slices(content: memoryview) -> Iterator[bytes]:
    return (bytes(content[at : at + _SLICE_BYTES]) for at in range(0, len(content), _SLICE_BYTES))


def _is_data_url(body: bytes, sign: int, since: int) -> bool:
    """Whether the string around ``sign`` begins as a data URL does."""
    quote = body.rfind(b'"', max(since, sign - _HEAD_MAX_BYTES), sign)
    return quote > 0 and body.startswith(_START, quote) and body[quote - 1] != _BACKSLASH
