"""Bodies, pictures and headers: pure functions against libraries, oracles and random input."""

import io
import json
import struct
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from epd_proxy.errors import ConfigError, InvalidRequestError, ProxyError
from epd_proxy.protocol import (
    APIS,
    CHAT,
    COMPLETIONS,
    choose_request_id,
    forwarded_headers,
    parse_request,
    returned_headers,
    trace_id,
)
from epd_proxy.protocol.images import image_size
from epd_proxy.protocol.writing import write_json
from fakes.proxy_stack import ITEM_KEY, chat, data_url, image_part, picture, url_part

FORMS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}), ("GIF", {}), ("BMP", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}),
    ("WEBP", {"lossless": True}), ("AVIF", {"speed": 10}), ("WEBP", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
]  # fmt: skip


STARTS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFFxxxxWEBPVP8 ",
          b"RIFFxxxxWEBPVP8L", b"RIFFxxxxWEBPVP8X", b"0000ftypavif0000ispe", picture(9, "JPEG")[:80]]  # fmt: skip


@settings(max_examples=60)
@given(st.sampled_from(FORMS), st.integers(1, 700), st.integers(1, 700))
def test_sizes_are_those_pillow_reads(form: tuple[str, dict[str, Any]], width: int, height: int) -> None:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, form[0], **form[1])
    assert image_size(out.getvalue()) == (width, height)


def test_a_heic_has_the_size_of_its_whole_and_not_of_its_tiles() -> None:
    def extent(width: int, height: int) -> bytes:
        return b"\0\0\0\x14ispe\0\0\0\0" + struct.pack(">II", width, height)

    start = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\1\0meta"
    for extents in ([(512, 512), (4032, 3024)], [(4032, 3024), (512, 512)]):
        assert image_size(start + b"".join(extent(*each) for each in extents) + b"mdat") == (4032, 3024)


def test_a_bmp_of_os2_is_read_as_pillow_does() -> None:
    content = struct.pack("<2sIHHIIHHHH", b"BM", 26 + 12 * 7, 0, 0, 26, 12, 3, 7, 1, 24) + bytes(12 * 7)
    with Image.open(io.BytesIO(content)) as opened:
        assert image_size(content) == opened.size == (3, 7)


@given(st.sampled_from(STARTS), st.binary(max_size=64))
def test_no_header_makes_it_fail(start: bytes, rest: bytes) -> None:
    size = image_size(start + rest)
    assert size is None or min(size) > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_header_has_no_size(form: tuple[str, dict[str, Any]]) -> None:
    content = picture(300, form[0], **form[1])
    full = [image_size(content[:length]) for length in range(min(len(content), 1000))]
    assert set(full) <= {None, (300, 300)}
    assert full[0] is None


TOP_LEVEL = ["messages", "prompt", "model", "n", "max_tokens", "stream", "vllm_xargs", "kv_transfer_params"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["image_url", "video_url", "input_audio", "data:image/png;base64,QUJD", "http://x/"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["type", "content", "role", "source", "output", "image_url", "video_url",
                                       "audio_url", "input_audio",
                                       "url", "data", "uuid", "text"]) | st.text(max_size=4), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=300, deadline=None)  # a busy machine takes its time
@given(st.dictionaries(st.sampled_from([*TOP_LEVEL, "input", "system"]), json_values), st.sampled_from(APIS))
def test_any_document_is_parsed_or_refused(document: dict[str, Any], api: Any) -> None:
    body = json.dumps(document).encode()
    try:
        request = parse_request(api, body, items_max=8, key=ITEM_KEY)
    except InvalidRequestError:
        return  # any other exception fails the test
    assert request.text_tokens >= 0
    assert request.output_tokens > 0
    assert all(item.cost > 0 for item in request.items)
    assert "kv_transfer_params" not in json.loads(request.body)
    if "kv_transfer_params" not in body.decode():
        assert request.body is body


def test_what_a_request_weighs() -> None:
    def weigh(document: dict[str, Any], api: Any = CHAT) -> tuple[int, int, list[int]]:
        request = parse_request(api, json.dumps(document).encode(), items_max=9, key=ITEM_KEY)
        return request.text_tokens, request.output_tokens, [item.cost for item in request.items]

    assert weigh(chat(text="x" * 400)) == (100, 8, [])
    assert weigh(chat(image_part(picture(56)), text="x" * 400, max_completion_tokens=20, n=3)) == (100, 60, [4])
    assert weigh(chat(url_part("http://a/b.png"), max_tokens=10**9)) == (2, 4096, [1024])
    assert weigh(chat(url_part(data_url(b"no header that we know")))) == (2, 8, [1024])
    assert weigh({"prompt": [1] * 50}, COMPLETIONS) == (50, 256, [])
    assert weigh({"prompt": [[1] * 50, "x" * 40]}, COMPLETIONS) == (60, 256, [])


def test_frames_and_loose_base64_are_left_to_vllm() -> None:
    """vLLM joins JPEG frames of a video by commas, and skips line breaks in sound; both work, so both pass."""
    parts = [url_part("data:video/jpeg;base64,QUJD,QUJD", "video_url"),
             {"type": "input_audio", "input_audio": {"data": "QUJD\nQUJD", "format": "wav"}}]  # fmt: skip
    assert len(parse_request(CHAT, json.dumps(chat(*parts)).encode(), items_max=9, key=ITEM_KEY).items) == 2


def test_headers_end_to_end() -> None:
    given_headers = [
        ("Host", "x"), ("Connection", "keep-alive, X-Hop"), ("X-Hop", "1"), ("Keep-Alive", "5"), ("TE", "trailers"),
        ("Transfer-Encoding", "chunked"), ("Content-Length", "3"), ("Expect", "100-continue"),
        ("Accept-Encoding", "br"),
        ("Content-Type", "application/json"), ("X-Data-Parallel-Rank", "7"), ("X-Mine", "a"), ("X-Mine", "b"),
    ]  # fmt: skip
    assert forwarded_headers(given_headers, "keep-alive, X-Hop") == [
        ("Content-Type", "application/json"),
        ("X-Mine", "a"),
        ("X-Mine", "b"),
    ]
    answered = [
        (b"Server", b"uvicorn"),
        (b"X-Hop", b"1"),
        (b"Date", b"x"),
        (b"Connection", b"X-Hop"),
        (b"X-Metrics", b"1"),
    ]
    assert returned_headers(answered) == [("X-Metrics", "1")]


def test_request_and_trace_ids() -> None:
    assert choose_request_id({"x-request-id": "mine-1"}) == "mine-1"
    for bad in ("", "a b", "é", "x" * 201, "a\r\nb"):
        assert choose_request_id({"x-request-id": bad}) != bad
    assert trace_id({"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}) == "1" * 32
    assert trace_id({"traceparent": "nonsense"}) == trace_id({}) == ""


def test_every_error_class_has_a_status_and_openais_form() -> None:
    def classes(base: type[ProxyError]) -> list[type[ProxyError]]:
        return [base, *(c for sub in base.__subclasses__() for c in classes(sub))]

    for kind in classes(ProxyError):
        if kind is not ConfigError and kind.__init__ is ProxyError.__init__:
            error = json.loads(kind("why é \udcff").body())["error"]
            assert error == {"message": "why é \\udcff", "type": kind.kind, "param": None, "code": kind.status}
            assert 400 <= kind.status < 600
            assert orjson.dumps(kind("\udcff").detail)  # what the log says


def test_long_strings_are_written_as_orjson_does() -> None:
    long = 'a"\\\n🍵é\u2028' * 300_000
    deep: object = long
    for _ in range(200):
        deep = [deep]
    document = {"b": long, "a": [{"url": long, "n": 1.5}, long, None], "ids": [1, 2], "deep": deep, "": {}}
    assert write_json(document) == orjson.dumps(document)
