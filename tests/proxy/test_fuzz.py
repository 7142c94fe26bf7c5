"""Whatever a body is: never a 500, and never more than a moment in which nothing else is served."""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epd_proxy.errors import InvalidRequestError
from epd_proxy.protocol.weighing import CONTAINERS_MAX, VALUES_MAX, check_weight
from fakes.instances import FakeInstance, Recorded, web
from fakes.proxy_stack import CHAT, COMPLETIONS, ProxyStack, Reply, chat, image_part

PATHS = (CHAT, COMPLETIONS, "/v1/messages", "/v1/responses", "/v1/embeddings")
LOOP_S = 0.05


async def unmoved(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> web.Response:
    """Answer without a look at the request: what takes time here is the proxy's."""
    return web.Response(body=b'{"id": "x", "choices": []}', content_type="application/json")


class Fuzzed:
    """A stack that stays for all bodies of a test."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._stack = ProxyStack()
        for instance in (*self._stack.encoders, *self._stack.instances):
            instance.default = unmoved

    def __enter__(self) -> "Fuzzed":
        self._runner.run(self._stack.__aenter__())
        return self

    def __exit__(self, *exc: Any) -> None:
        self._runner.run(self._stack.__aexit__(*exc))
        self._runner.close()

    def post(self, body: bytes, path: str) -> Reply:
        for instance in (*self._stack.encoders, *self._stack.instances):
            instance.requests.clear()
        return self._runner.run(self._stack.post(body, path))

    def longest_turn_s(self, body: bytes, path: str) -> float:
        """CPU time of the loop's own thread between two of its beats, at the most."""

        async def run() -> float:
            longest_s, last_s = 0.0, time.thread_time()
            sending = asyncio.create_task(self._stack.post(body, path))
            while not sending.done():
                await asyncio.sleep(0.001)
                now_s = time.thread_time()
                longest_s, last_s = max(longest_s, now_s - last_s), now_s
            assert (await sending).status != 500
            return longest_s

        return self._runner.run(run())


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    with Fuzzed() as stack:
        yield stack


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=20),
    st.sampled_from(["image_url", "input_audio", "data:image/png;base64,QUJD", "http://a.test/x", "user", "\ud800",
                     "data:image/png;base64,", "file:///x", "data:video/jpeg;base64,QUJD,QUJD", "text"]),
)  # fmt: skip
NAMES = st.sampled_from(
    ["messages", "content", "role", "type", "text", "image_url", "url", "input_audio", "data", "video_url", "uuid",
     "prompt", "input", "model", "max_tokens", "max_completion_tokens", "n", "stream", "kv_transfer_params",
     "ec_transfer_params", "vllm_xargs", "tools", "mm_processor_kwargs", "source", "system", "previous_response_id"]
) | st.text(max_size=5)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=25
)
PARTS = st.lists(
    st.fixed_dictionaries({"type": SCALARS}, optional={"image_url": VALUES, "text": VALUES, "uuid": VALUES}) | VALUES,
    max_size=4,
)
DOCUMENTS = st.dictionaries(NAMES, VALUES, max_size=8) | st.fixed_dictionaries(
    {"messages": st.lists(st.fixed_dictionaries({"role": SCALARS, "content": PARTS | VALUES}) | VALUES, max_size=3)},
    optional={"kv_transfer_params": VALUES, "vllm_xargs": VALUES, "max_tokens": VALUES, "n": VALUES, "model": VALUES},
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS | VALUES, path=st.sampled_from(PATHS))
def test_no_document_is_a_500(fuzzed: Fuzzed, document: Any, path: str) -> None:
    body = json.dumps(document, ensure_ascii=True).encode()  # NaN, Infinity and lone surrogates as Python writes them
    reply = fuzzed.post(body, path)
    assert reply.status in (200, 400, 404), reply


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200), path=st.sampled_from(PATHS))
def test_no_bytes_are_a_500(fuzzed: Fuzzed, body: bytes, path: str) -> None:
    assert fuzzed.post(body, path).status in (200, 400, 404)


def nested(depth: int) -> bytes:
    return b'{"kv_transfer_params": 1, "a":' + b"[" * depth + b"]" * depth + b"}"


def deep_part(depth: int) -> bytes:
    part = json.dumps(image_part()).encode()[:-1] + b', "x":' + b"[" * depth + b"]" * depth + b"}"
    return b'{"messages": [{"role": "user", "content": [%b]}]}' % part


def deep_uuid(depth: int) -> bytes:
    return deep_part(depth).replace(b'"x":', b'"uuid":')


def deep_options(depth: int) -> bytes:
    return deep_part(1)[:-1] + b', "mm_processor_kwargs": {"x":' + b"[" * depth + b"]" * depth + b"}}"


@pytest.mark.parametrize("depth", [200, 253, 254, 255, 300, 1000, 1022, 1024, 5000])
@pytest.mark.parametrize("make", [nested, deep_part, deep_uuid, deep_options])
def test_nesting_is_told(fuzzed: Fuzzed, make: Any, depth: int) -> None:
    """orjson reads 1024 deep and writes 254 deep: what lies between, and has to be written anew, is refused."""
    reply = fuzzed.post(make(depth), CHAT)
    assert reply.status == (200 if depth < 245 else 400) or depth in (253, 254), reply
    if reply.status == 400:
        assert reply.error["message"]


HEAVY = {
    "parts": json.dumps(chat(*[{"type": "text", "text": "a"}] * 100_000)).encode(),
    "messages": json.dumps({"messages": [{"role": "user", "content": "a"}] * 50_000}).encode(),
    "lists": b'{"prompt": [' + b"[]," * 1_000_000 + b"[]]}",
    "numbers": b'{"prompt": [' + b"1," * 3_000_000 + b"1]}",
    "braces in a text": json.dumps(chat(text="{[,\\\"" * 1_000_000)).encode(),
    "pictures": json.dumps(chat(*[image_part()] * 5_000)).encode(),
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_no_body_holds_up_the_others(fuzzed: Fuzzed, name: str) -> None:
    """CPU time, since a busy machine stretches any other. A thread's is bounded by the next test."""
    body = HEAVY[name]
    fuzzed.post(body, CHAT)
    assert min(fuzzed.longest_turn_s(body, CHAT) for _ in range(3)) < LOOP_S


@pytest.mark.parametrize(
    ("name", "refused"), [("parts", False), ("messages", False), ("lists", True), ("numbers", True),
                          ("braces in a text", False)],
)  # fmt: skip
def test_what_would_be_too_much_to_parse_is_refused(fuzzed: Fuzzed, name: str, refused: bool) -> None:
    reply = fuzzed.post(HEAVY[name], CHAT)
    assert reply.status == (400 if refused else 200)
    if refused:
        assert "at most" in reply.error["message"]


@given(text=st.text(alphabet='{[,"\\a', max_size=30), inside=st.integers(0, 3), outside=st.integers(0, 3))
def test_strings_do_not_count(text: str, inside: int, outside: int) -> None:
    many = "[" * CONTAINERS_MAX
    within = json.dumps({"a": [text, many * inside], "b": text}).encode()
    check_weight(within)
    expected = pytest.raises(InvalidRequestError) if outside else contextlib.nullcontext()
    with expected:
        check_weight(within + b"," + (b"[]," * CONTAINERS_MAX * outside))
    assert VALUES_MAX > CONTAINERS_MAX
