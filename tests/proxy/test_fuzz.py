"""Whatever a body is: never a 500, and never more than a moment in which nothing else is served."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epd_proxy.errors import InvalidRequestError
from epd_proxy.protocol.weighing import LIGHT_BYTES, WEIGHT_MAX, check_weight, weigh
from epd_proxy.staging import Balance, HandshakeConfig, Items
from fakes.instances import FakeInstance, Recorded, web
from fakes.proxy_stack import CHAT, COMPLETIONS, ProxyStack, Reply, chat, image_part

PATHS = (CHAT, COMPLETIONS, "/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/new", "/tokenize", "/detokenize")
LOOP_S = 0.05
# On a busy machine two threads of one core get half of it each, and CPU time says nothing of that.
BUSY = 2
CALLBACK = re.compile(rb'"metaserver":"([^"]+)"')


async def unmoved(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> web.Response:
    """Answer without a look at the request: what takes time here is the proxy's."""
    return web.Response(body=b'{"id": "x", "choices": []}', content_type="application/json")


async def calls_back(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.Response:
    """Ask for KV as decode does, but do not read the request."""
    if found := CALLBACK.search(recorded.body[-300:]):
        url, blocks = found[1].decode(), {"remote_block_ids": [[1]]}
        async with aiohttp.ClientSession() as client, client.post(url, json=blocks) as response:
            assert response.status == 200
    return await unmoved(instance, request, recorded)


async def keeps_kv(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> web.Response:
    """Say where the KV lies, as prefill does of which it is pulled."""
    return web.json_response({"id": "x", "choices": [], "kv_transfer_params": {"remote_engine_id": "p"}})


STACKS: dict[str, dict[str, Any]] = {
    "colocated": {"balance": Balance(policy="prefix")},
    "overlapped": {"items": Items(consumers_wait="on", known_ttl_s=0)},
    "layerwise": {"prefills": 1, "decodes": 1},
    "pull": {"prefills": 1, "decodes": 1, "handshake": HandshakeConfig("pull")},
}


class Fuzzed:
    """A stack that stays for all bodies of a test."""

    def __init__(self, name: str) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._stack = ProxyStack(**STACKS[name])
        for instance in self._stack.fakes:
            instance.default = unmoved
        for prefill in self._stack.prefills if name == "pull" else ():
            prefill.default = keeps_kv
        for decode in self._stack.decodes if name == "layerwise" else ():
            decode.default = calls_back

    def __enter__(self) -> "Fuzzed":
        self._runner.run(self._stack.__aenter__())
        return self

    def __exit__(self, *exc: Any) -> None:
        self._runner.run(self._stack.__aexit__(*exc))
        self._runner.close()

    def post(self, body: bytes, path: str) -> Reply:
        for instance in self._stack.fakes:
            instance.requests.clear()
        return self._runner.run(self._stack.post(body, path))

    def longest_turns_s(self, body: bytes, path: str) -> tuple[float, float]:
        """CPU time between two beats of the loop, at the most: of its own thread, and of all together."""

        async def run() -> tuple[float, float]:
            own_s = all_s = 0.0
            own_last_s, all_last_s = time.thread_time(), time.process_time()
            sending = asyncio.create_task(self._stack.post(body, path))
            while not sending.done():
                await asyncio.sleep(0.001)
                own_now_s, all_now_s = time.thread_time(), time.process_time()
                own_s, all_s = max(own_s, own_now_s - own_last_s), max(all_s, all_now_s - all_last_s)
                own_last_s, all_last_s = own_now_s, all_now_s
            assert (await sending).status != 500
            return own_s, all_s

        return self._runner.run(run())


@pytest.fixture(scope="module", params=STACKS)
def fuzzed(request: pytest.FixtureRequest) -> Iterator[Fuzzed]:
    with Fuzzed(request.param) as stack:
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


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS | VALUES, path=st.sampled_from(PATHS))
def test_no_document_is_a_500(fuzzed: Fuzzed, document: Any, path: str) -> None:
    body = json.dumps(document, ensure_ascii=True).encode()  # NaN, Infinity and lone surrogates as Python writes them
    reply = fuzzed.post(body, path)
    assert reply.status in (200, 400, 404), reply


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def texts(count: int) -> bytes:
    return json.dumps(chat(*[{"type": "text", "text": "a"}] * count)).encode()


HEAVY = {
    "parts": texts(40_000),
    "messages": json.dumps({"messages": [{"role": "user", "content": "a"}] * 40_000}).encode(),
    "members": json.dumps({f"k{number}": 1 for number in range(100_000)}).encode(),
    "strings": b'{"prompt": [' + b'"abcdefgh",' * 400_000 + b'""]}',
    "tokens": b'{"prompt": [' + b"54321," * 900_000 + b"1]}",
    "braces in a text": json.dumps(chat(text='{[,\\"' * 1_000_000)).encode(),
    "a long text": json.dumps(chat(text="a" * 8_000_000)).encode(),
}
TOO_HEAVY = {
    "too many parts": texts(100_000),
    "too many lists": b'{"prompt": [' + b"[]," * 1_000_000 + b"[]]}",
    "too many numbers": b'{"prompt": [' + b"1," * 3_000_000 + b"1]}",
    "too many members": json.dumps({f"k{number}": 1 for number in range(200_000)}).encode(),
    "too many pictures": json.dumps(chat(*[image_part()] * 5_000)).encode(),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", [*HEAVY, *TOO_HEAVY])
def test_no_body_holds_up_the_others(fuzzed: Fuzzed, name: str, path: str) -> None:
    """CPU time, since a busy machine stretches any other; of all threads too, as one may keep the GIL. The best of some
    tries: the garbage collector has its turns.
    """
    body = {**HEAVY, **TOO_HEAVY}[name]
    turns = []
    for _ in range(6):
        turns.append(fuzzed.longest_turns_s(body, path))
        if min(own_s for own_s, _ in turns) < LOOP_S and min(all_s for _, all_s in turns) < BUSY * LOOP_S:
            return
    raise AssertionError(f"the loop stood still for so many seconds of its own CPU time, and of all threads': {turns}")


@pytest.mark.parametrize("name", HEAVY)
def test_what_can_be_parsed_in_time_is_served(fuzzed: Fuzzed, name: str) -> None:
    assert fuzzed.post(HEAVY[name], CHAT).status == 200


@pytest.mark.parametrize("name", TOO_HEAVY)
def test_what_would_be_too_much_to_parse_is_refused(fuzzed: Fuzzed, name: str) -> None:
    reply = fuzzed.post(TOO_HEAVY[name], CHAT)
    assert reply.status == 400
    assert "at most" in reply.error["message"]


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet='{[,:"\\a', max_size=30), inside=st.integers(0, 3), outside=st.integers(0, 3))
def test_strings_do_not_count(text: str, inside: int, outside: int) -> None:
    many = "[{:," * (WEIGHT_MAX // 10)
    within = json.dumps({"a": [text, many * inside], "b": text}).encode()
    check_weight(within)
    expected = pytest.raises(InvalidRequestError) if outside else contextlib.nullcontext()
    with expected:
        check_weight(within + b"," + (b"1," * (WEIGHT_MAX + 1) * outside))


SMALL = st.integers(0, 9) | st.just("")
DENSE = st.recursive(SMALL, lambda inner: st.lists(inner) | st.dictionaries(st.just(""), inner), max_leaves=40)


@given(DENSE)
def test_short_bodies_need_not_be_weighed(document: Any) -> None:
    """Nothing weighs more for its length than what :data:`LIGHT_BYTES` takes for the heaviest."""
    body = json.dumps(document, separators=(",", ":")).encode()
    assert weigh(body) * LIGHT_BYTES <= (len(body) + 1) * WEIGHT_MAX
