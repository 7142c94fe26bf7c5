import pytest
from hypothesis import given
from hypothesis import strategies as st

from epd_connector.header import (
    HEADER_SIZE_BYTES,
    ITEM_SIZE_BYTES,
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
