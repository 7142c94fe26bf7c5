import math

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from epd_connector.header import (
    _FIELDS,
    HEADER_SIZE_BYTES,
    ITEM_SIZE_BYTES,
    MAGIC,
    MAX_DIMENSIONS,
    VERSION,
    Header,
    HeaderError,
    WrongRowsError,
    checksum,
    parse_header,
    verify_object,
)
from epd_connector.keys import hash_item_id

headers = st.builds(
    Header,
    dtype=st.sampled_from(list(ITEM_SIZE_BYTES)),
    shape=st.lists(st.integers(0, 1 << 12), min_size=1, max_size=4).map(tuple),
    payload_checksum=st.integers(0, (1 << 64) - 1),
    item_hash=st.binary(min_size=32, max_size=32),
)


def make_object(payload: bytes, item_id: str = "picture", rows: int = 3) -> bytearray:
    shape = (rows, len(payload) // rows // 2)
    return bytearray(Header("bfloat16", shape, checksum(payload), hash_item_id(item_id)).pack() + payload)


@given(headers)
def test_round_trip(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_SIZE_BYTES
    assert parse_header(packed) == header


@given(headers, st.integers(0, HEADER_SIZE_BYTES * 8 - 1))
def test_any_flipped_bit_is_found(header: Header, bit: int) -> None:
    damaged = bytearray(header.pack())
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(HeaderError):
        parse_header(bytes(damaged))


@given(st.binary(max_size=600))
def test_noise_is_refused_and_raises_nothing_else(noise: bytes) -> None:
    with pytest.raises(HeaderError):
        parse_header(noise)


uint64s = st.integers(0, (1 << 64) - 1) | st.integers(0, 9)
uint16s = st.integers(0, (1 << 16) - 1) | st.integers(0, 9)
dtypes = st.binary(max_size=16) | st.sampled_from([name.encode() for name in ITEM_SIZE_BYTES])


@settings(max_examples=1000)
@given(
    dtype=dtypes,
    dimensions=uint16s,
    reserved=uint16s,
    shape=st.lists(uint64s, min_size=MAX_DIMENSIONS, max_size=MAX_DIMENSIONS),
    size_bytes=uint64s | st.none(),
    tail=st.just(b"") | st.binary(max_size=100),
)
def test_any_fields_under_a_right_checksum_are_a_header_or_an_error(
    *, dtype: bytes, dimensions: int, reserved: int, shape: list[int], size_bytes: int | None, tail: bytes
) -> None:
    """Noise never gets past the magic; this does. What is accepted is what would have been written, to the byte."""
    if size_bytes is None:  # the one that fits
        item_size_bytes = ITEM_SIZE_BYTES.get(dtype.rstrip(b"\0").decode("ascii", "replace"), 1)
        size_bytes = math.prod(shape[:dimensions]) * item_size_bytes % (1 << 64)
    fields = _FIELDS.pack(MAGIC, VERSION, dimensions, reserved, dtype, *shape, size_bytes, 7, bytes(32))
    checked = (fields + tail).ljust(HEADER_SIZE_BYTES - 8, b"\0")[: HEADER_SIZE_BYTES - 8]
    raw = checked + xxhash.xxh3_64_intdigest(checked).to_bytes(8, "little")
    try:
        header = parse_header(raw)
    except HeaderError:
        return
    assert header.pack() == raw
    assert header.payload_size_bytes == size_bytes


@given(headers, st.integers(0, HEADER_SIZE_BYTES - 1))
def test_truncation_is_found(header: Header, length: int) -> None:
    with pytest.raises(HeaderError, match="expected at least 256"):
        parse_header(header.pack()[:length])


def test_whole_object_is_accepted() -> None:
    data = make_object(bytes(range(60)))
    assert verify_object(memoryview(data), hash_item_id("picture"), 3).shape == (3, 10)


@given(st.integers(0, HEADER_SIZE_BYTES * 8 + 60 * 8 - 1))
def test_any_flipped_bit_of_an_object_is_found(bit: int) -> None:
    data = make_object(bytes(range(60)))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(HeaderError):
        verify_object(memoryview(data), hash_item_id("picture"), 3)


@pytest.mark.parametrize("change", [-1, 1], ids=["shorter", "longer"])
def test_wrong_length_is_found(change: int) -> None:
    data = make_object(bytes(range(60)))
    data = data[:change] if change < 0 else data + b"\0"
    with pytest.raises(HeaderError, match="its header says"):
        verify_object(memoryview(data), hash_item_id("picture"), 3)


def test_another_items_object_is_refused() -> None:
    with pytest.raises(HeaderError, match="another item"):
        verify_object(memoryview(make_object(bytes(60))), hash_item_id("other"), 3)


def test_other_row_count_is_told_from_corruption() -> None:
    with pytest.raises(WrongRowsError, match="has 3 rows, the request needs 4"):
        verify_object(memoryview(make_object(bytes(60))), hash_item_id("picture"), 4)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("int8", (1,)), ("float32", ()), ("float32", (1,) * 9), ("float32", (-1,))]
)
def test_what_cannot_be_described_is_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(HeaderError, match="cannot be stored"):
        Header(dtype, shape, 0, bytes(32))
