"""What is cut out of bodies changes nothing of what is made of them."""

import base64
import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd_proxy.errors import InvalidRequestError
from epd_proxy.protocol import APIS, CHAT, MESSAGES, parse_request, prefill_body
from epd_proxy.protocol.encode import encode_body
from epd_proxy.protocol.inline import cut_out
from fakes.proxy_stack import ITEM_KEY, chat, url_part

LONG = [base64.b64encode(os.urandom(size)).decode() for size in (3072, 6000, 9001)]
TEXTS = [*(f"data:image/png;base64,{text}" for text in LONG), f"data:video/mp4;base64,{LONG[0]}", LONG[1],
         f"data:video/jpeg;base64,{LONG[0]},{LONG[1]}", f'say "data:image/png;base64,{LONG[0]}"',
         f"data:image/png;base64,{LONG[0]}\n", f"data:image/png;base64,{LONG[0]}é", f"DATA:image/png;base64,{LONG[2]}",
         "data:image/png;base64,QUJD", "\\", '\\"data:;base64,',
         f"data:;base64,{LONG[1]};base64,{LONG[1]}", "text"]  # fmt: skip
PARTS = st.builds(
    lambda kind, field, text, bare: {"type": kind, field: text if bare else {"url": text}},
    st.sampled_from(["image_url", "video_url", "audio_url", "text", "input_image", "image"]),
    st.sampled_from(["image_url", "video_url", "audio_url", "text", "uuid", "source"]),
    st.sampled_from(TEXTS),
    st.booleans(),
)
DOCUMENTS = st.fixed_dictionaries(
    {"messages": st.lists(st.builds(lambda parts: {"role": "user", "content": parts}, st.lists(PARTS, max_size=3)),
                          max_size=2)},
    optional={"input": st.sampled_from(TEXTS), "kv_transfer_params": st.just({}), "user": st.sampled_from(TEXTS),
              TEXTS[0]: st.just(1)},
)  # fmt: skip


def read(api: Any, body: bytes) -> Any:
    """Return all that the stages are sent of a body, or that it is refused."""
    try:
        request = parse_request(api, body, items_max=9, key=ITEM_KEY, tenant="t")
    except InvalidRequestError:
        return "refused"
    items = [(i.modality, i.name, i.cost, i.remote, json.loads(encode_body(request, i))) for i in request.items]
    prefilled = json.loads(prefill_body(request.document, {}, request.inline))
    return json.loads(request.body), items, prefilled, request.text_tokens, request.output_tokens


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS, st.sampled_from(APIS), st.booleans())
def test_whatever_is_cut_out_the_stages_get_the_same(document: dict[str, Any], api: Any, escaped: bool) -> None:
    body = json.dumps(document, ensure_ascii=escaped).encode()
    # Written with an escape in it, nothing is taken for a data URL.
    as_it_is = body.replace(b";base64,", b"\\u003bbase64,")
    assert cut_out(as_it_is)[1] is None
    assert read(api, body) == read(api, as_it_is)


def test_pictures_are_cut_out_and_stay_where_they_are() -> None:
    document = chat(*(url_part(text) for text in TEXTS[:3]), text="x" * 40)
    body = json.dumps(document).encode()
    outline, inline = cut_out(body)
    assert inline is not None
    assert len(outline) < 1000 < len(body)
    assert inline.restore_in(outline) == body
    request = parse_request(CHAT, body, items_max=9, key=ITEM_KEY)
    assert len(str(request.document)) < 2000
    assert request.text_tokens == 10
    for part, text in zip(json.loads(request.body)["messages"][0]["content"], TEXTS, strict=False):
        if part["type"] != "text":
            assert part.pop("uuid")
            assert part == url_part(text)


@pytest.mark.parametrize("bad", [b"\n", b"\xff", b"\t", b"@", b"\\!"])
@pytest.mark.parametrize("field", ["image_url", "video_url", "unknown"])
def test_what_is_no_json_is_refused_wherever_it_is(bad: bytes, field: str) -> None:
    body = json.dumps(chat(url_part(TEXTS[1], field))).encode().replace(b"base64,", b"base64," + b"A" * 4000 + bad)
    found = read(CHAT, body)
    # vLLM skips what is not of the alphabet in videos.
    assert found == "refused" if bad != b"@" or field == "image_url" else found[0]["messages"]


def test_a_name_that_is_given_twice_counts_as_in_json() -> None:
    part = json.dumps(url_part(TEXTS[1]))[:-1] + ',"image_url":{"url":"http://a.test/b"}}'
    body = json.dumps(chat(url_part("MARK"))).replace(json.dumps(url_part("MARK")), part).encode()
    request = parse_request(CHAT, body, items_max=9, key=ITEM_KEY)
    assert [item.remote for item in request.items] == [True]
    assert request.body is body


def test_no_mark_can_be_told_before() -> None:
    body = json.dumps(chat(url_part(TEXTS[1]))).encode()
    assert cut_out(body)[0] != cut_out(body)[0]
    assert parse_request(MESSAGES, body, items_max=9, key=ITEM_KEY).body is body
