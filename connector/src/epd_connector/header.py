"""The first 256 bytes of a stored object: what the payload is, and how to know that it is whole.

Layout, little endian: magic 8s · version u16 · ndim u16 · reserved u32 · dtype 16s · shape 8 x u64 · payload size u64 ·
payload checksum u64 (XXH3-64) · item hash 32s (SHA-256 of the item id) · zeros · header checksum u64 (XXH3-64 of
the bytes before it). The payload starts at byte 256, row-major.
"""

import math
import struct
from dataclasses import dataclass

import xxhash

HEADER_SIZE_BYTES = 256
VERSION = 1
MAX_DIMENSIONS = 8
MAGIC = b"EPD-EC\r\n"
ITEM_SIZE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}

_FIELDS = struct.Struct(f"<8sHHI16s{MAX_DIMENSIONS}QQQ32s")
_CHECKSUM = struct.Struct("<Q")
_CHECKED_SIZE_BYTES = HEADER_SIZE_BYTES - _CHECKSUM.size


class HeaderError(ValueError):
    """A stored object is not what its key promises: truncated, corrupted or of another item."""


class WrongRowsError(HeaderError):
    """A stored object is intact and belongs to the item, but the request needs another number of rows."""


@dataclass(frozen=True)
class Header:
    """Description of one embedding: torch dtype name, shape (rows first), checksum and item hash (32 bytes)."""

    dtype: str
    shape: tuple[int, ...]
    payload_checksum: int
    item_hash: bytes

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZE_BYTES:
            raise HeaderError(f"dtype {self.dtype!r} cannot be stored, expected one of {', '.join(ITEM_SIZE_BYTES)}")
        if not 1 <= len(self.shape) <= MAX_DIMENSIONS or min(self.shape) < 0:
            raise HeaderError(f"shape {self.shape} cannot be stored, expected 1 to {MAX_DIMENSIONS} sizes ≥ 0")
        if len(self.item_hash) != 32:
            raise HeaderError(f"item hash has {len(self.item_hash)} bytes, expected 32")

    @property
    def payload_size_bytes(self) -> int:
        """Size of the payload that follows the header."""
        return math.prod(self.shape) * ITEM_SIZE_BYTES[self.dtype]

    @property
    def object_size_bytes(self) -> int:
        """Size of header and payload together."""
        return HEADER_SIZE_BYTES + self.payload_size_bytes

    def pack(self) -> bytes:
        """Return the 256 bytes."""
        shape = self.shape + (0,) * (MAX_DIMENSIONS - len(self.shape))
        fields = _FIELDS.pack(
            MAGIC,
            VERSION,
            len(self.shape),
            0,
            self.dtype.encode(),
            *shape,
            self.payload_size_bytes,
            self.payload_checksum,
            self.item_hash,
        ).ljust(_CHECKED_SIZE_BYTES, b"\0")
        return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def checksum(payload: bytes | memoryview) -> int:
    """Return XXH3-64 of the payload; the GIL is free meanwhile for large ones."""
    return xxhash.xxh3_64_intdigest(payload)


def parse_header(data: bytes | memoryview) -> Header:
    """Read a header. Raises HeaderError for anything but 256 intact bytes of a known version."""
    raw = bytes(data[:HEADER_SIZE_BYTES])
    if len(raw) < HEADER_SIZE_BYTES:
        raise HeaderError(f"object has {len(raw)} bytes, expected at least {HEADER_SIZE_BYTES}")
    magic, version, dimensions, _, dtype, *rest = _FIELDS.unpack_from(raw)
    if magic != MAGIC:
        raise HeaderError(f"magic is {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise HeaderError(f"version is {version}, expected {VERSION}")
    if _CHECKSUM.unpack_from(raw, _CHECKED_SIZE_BYTES)[0] != xxhash.xxh3_64_intdigest(raw[:_CHECKED_SIZE_BYTES]):
        raise HeaderError("header checksum does not match")
    *shape, payload_size_bytes, payload_checksum, item_hash = rest
    header = Header(
        dtype=dtype.rstrip(b"\0").decode("ascii", "replace"),
        shape=tuple(shape[:dimensions]),
        payload_checksum=payload_checksum,
        item_hash=item_hash,
    )
    if header.payload_size_bytes != payload_size_bytes:
        raise HeaderError(f"payload size is {payload_size_bytes}, shape {header.shape} of {header.dtype} needs another")
    if header.pack() != raw:
        raise HeaderError("header has bytes that no writer of this version sets")
    return header


def verify_object(data: memoryview, item_hash: bytes, rows: int) -> Header:
    """Check a whole stored object against what the request needs and return its header.

    ``rows`` is the number of embeddings that vLLM will gather (``get_num_embeds()`` of the placeholder).
    Raises HeaderError with the first fault; nothing of an object is used before this returned.
    """
    header = parse_header(data)
    if len(data) != header.object_size_bytes:
        raise HeaderError(f"object has {len(data)} bytes, its header says {header.object_size_bytes}")
    if header.item_hash != item_hash:
        raise HeaderError("object belongs to another item")
    if checksum(data[HEADER_SIZE_BYTES:]) != header.payload_checksum:
        raise HeaderError("payload checksum does not match")
    if header.shape[0] != rows:
        raise WrongRowsError(f"object has {header.shape[0]} rows, the request needs {rows}")
    return header
