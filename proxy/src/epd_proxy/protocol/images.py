"""Width and height of a picture from its header alone; nothing is decoded."""

from struct import error as StructError  # noqa: N812 - an exception keeps its suffix
from struct import unpack_from

# Start-of-frame markers; C4, C8 and CC in that range mean something else (ITU T.81, table B.1).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Where the boxes are that describe an AVIF or HEIC; its pixels follow.
_HEIF_HEAD_BYTES = 16 * 1024
# A BMP of OS/2 has two bytes for each side (BITMAPCOREHEADER).
_OS2_HEADER_BYTES = 12
_JPEG_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) in pixels of a PNG, JPEG, WebP, GIF, BMP, AVIF or HEIC, None where it has none."""
    try:
        size = _read_size(data)
    except (IndexError, StructError):
        return None
    return size if size and size[0] > 0 and size[1] > 0 else None


def _read_size(data: bytes) -> tuple[int, int] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        width, height = unpack_from(">II", data, 16)
        return width, height
    if data.startswith(b"\xff\xd8"):
        return _jpeg_size(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        width, height = unpack_from("<HH", data, 6)
        return width, height
    if data.startswith(b"BM"):
        is_old = unpack_from("<I", data, 14)[0] == _OS2_HEADER_BYTES
        width, height = unpack_from("<HH" if is_old else "<ii", data, 18)
        return width, abs(height)  # a negative height means rows from the top
    return _heif_size(data) if data[4:8] == b"ftyp" else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at < len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _JPEG_FRAMES:
            height, width = unpack_from(">HH", data, at + 5)
            return width, height
        elif marker in _JPEG_WITHOUT_LENGTH:
            at += 2
        elif marker in (0xD9, 0xDA):  # the end, or pixels: too late for a frame header
            return None
        else:
            at += 2 + max(2, unpack_from(">H", data, at + 2)[0])
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        # Two 24-bit numbers at 24 and 27, each less one; unpack_from, unlike a slice, minds a header that is cut.
        return 1 + (unpack_from("<I", data, 24)[0] & 0xFFFFFF), 1 + (unpack_from("<I", data, 26)[0] >> 8)
    if kind == b"VP8L":
        bits = unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _heif_size(data: bytes) -> tuple[int, int] | None:
    """Return the largest of the sizes that the file's items have (``ispe``, ISO 23008-12): the others are its tiles."""
    largest: tuple[int, int] | None = None
    at = data.find(b"ispe", 0, _HEIF_HEAD_BYTES)
    while at >= 0:
        size = unpack_from(">II", data, at + 8)
        if largest is None or size[0] * size[1] > largest[0] * largest[1]:
            largest = size[0], size[1]
        at = data.find(b"ispe", at + 4, _HEIF_HEAD_BYTES)
    return largest
