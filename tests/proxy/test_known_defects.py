"""Each defect of today's example proxies, by its number: ours has none of them."""

import asyncio
import gc
import io
import json
import os
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from epd_proxy.config import ProxyConfig, Retry, Timeouts, Topology
from epd_proxy.flows import Job, Stages
from epd_proxy.flows.fanout import EncodeFanout
from epd_proxy.known import KnownItems
from epd_proxy.logs import AccessRecord
from epd_proxy.metrics import Metrics
from epd_proxy.plan import build
from epd_proxy.pool import Pool
from epd_proxy.protocol import CHAT as CHAT_API
from epd_proxy.protocol import decode_body, parse_request, pending_body
from epd_proxy.staging import Balance
from epd_proxy.upstream import Upstream
from fakes import instances as fake
from fakes.instances import FakeInstance
from fakes.proxy_process import ProxyProcess
from fakes.proxy_stack import (
    CHAT,
    COMPLETIONS,
    ITEM_KEY,
    MODEL,
    ProxyStack,
    chat,
    data_url,
    image_part,
    picture,
    read_to_break,
    unnamed,
    url_part,
)


@pytest.mark.parametrize("number", range(1, 28))
def test_each_defect_has_a_test_of_its_number(number: int) -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(re.search(rf"^(async )?def test_defect_{number:02}_", text, re.MULTILINE) for text in sources)


async def test_defect_01_completions_are_answered() -> None:
    async with ProxyStack() as stack:
        for prompt in ("Once", ["Once", "upon"], [1, 2, 3], [[1, 2], [3]]):
            reply = await stack.post({"model": MODEL, "prompt": prompt}, COMPLETIONS)
            assert (reply.status, reply.document["choices"][0]["text"]) == (200, "Ein Täßchen")
        streamed = await stack.post({"model": MODEL, "prompt": "Once", "stream": True}, COMPLETIONS)
        assert streamed.body == b"".join(fake.TEXT)
        assert [r.path for r in stack.instances[0].requests] == [COMPLETIONS] * 5
        assert stack.encoders[0].requests == []


async def test_defect_02_remote_urls_go_to_the_encoder_as_they_are() -> None:
    async with ProxyStack() as stack:
        part = url_part("https://example.test/cat.png")
        assert (await stack.post(chat(part))).status == 200
        assert stack.encoders[0].requests[0].parts == [part]


@pytest.mark.parametrize("prefix", ["file://", "", "FILE://", "ftp://host", " file://"])
async def test_defect_03_no_local_path_is_opened(prefix: str, tmp_path: object) -> None:
    path = f"{tmp_path}/fifo"
    os.mkfifo(path)  # opening it would block for ever
    async with ProxyStack() as stack:
        reply = await stack.post(chat(url_part(prefix + path)))
        assert reply.status == 400
        assert "data:" in reply.error["message"]
        assert (await stack.get("/health")).status == 200
        assert stack.encoders[0].requests == stack.instances[0].requests == []


async def test_defect_04_large_bodies_do_not_block_the_loop() -> None:
    """Parsed on the loop, this body would make others wait for as long as its parsing takes.

    The best of three: on a busy machine a process waits for its turn, whatever it does.
    """

    async def accept(*_arguments: object) -> web.Response:
        return web.json_response({"id": "read nothing, so that this process stays free to measure"})

    # Many parts, since orjson takes a long string in one go: that is short, but no thread makes it any shorter.
    texts = [{"type": "text", "text": "x"}] * 40_000
    body = json.dumps(chat(url_part(data_url(picture() + os.urandom(4 * 1024 * 1024))), *texts)).encode()
    async with FakeInstance(accept) as encoder, FakeInstance(accept) as instance:
        arguments = ("--encode", encoder.url, "--prefill-decode", instance.url, "--log-level", "error")
        async with ProxyProcess(*arguments) as proxy:
            parse_s = min(time_s(lambda: parse_request(CHAT_API, body, items_max=9, key=ITEM_KEY)) for _ in range(3))
            waits_s = [await longest_wait_s(proxy, body) for _ in range(3)]
    assert min(waits_s) < 0.6 * parse_s, (waits_s, parse_s)


async def test_defect_04_an_item_is_written_without_blocking_the_loop() -> None:
    """No encoder can be asked here, so that nothing but the writing takes time."""
    request = parse_request(
        CHAT_API, json.dumps(chat(url_part("https://a.test/" + "x" * 2**27))).encode(), items_max=9, key=ITEM_KEY
    )
    config = ProxyConfig(topology=Topology(prefill_decode=("http://pd:1",)))
    stages = Stages({"encode": Pool("encode", [])}, Upstream(config.timeouts), config, Metrics(), KnownItems(0))
    job = Job(request, build(request, {"encode": ()}), [], AccessRecord("POST", CHAT, "1"))
    whole_s = min(time_s(lambda: orjson.dumps(request.document)) for _ in range(3))
    waits_s = []
    for _ in range(3):
        writing = asyncio.create_task(EncodeFanout(stages).run(job))
        waits_s.append(await longest_beat_s(writing))
        await writing
    assert min(waits_s) < 0.5 * whole_s, (waits_s, whole_s)


async def test_defect_04_a_member_is_added_without_blocking_the_loop() -> None:
    """What the next stage is told stands at the end of the client's body, however long that is."""
    body = json.dumps(chat(text="x" * 2**27)).encode()
    request = parse_request(CHAT_API, body, items_max=9, key=ITEM_KEY)
    copy_s = min(time_s(lambda: body[1:]) for _ in range(3))  # which keeps the GIL
    for add in (lambda: decode_body(request, "http://a.test/"), lambda: pending_body(request)):
        waits_s = []
        for _ in range(5):
            adding = asyncio.create_task(asyncio.to_thread(add))
            waits_s.append(await longest_beat_s(adding))
            assert (await adding).startswith(body[:-1])
        assert min(waits_s) < 0.6 * copy_s, (waits_s, copy_s)


def time_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


async def longest_beat_s(task: asyncio.Task[Any]) -> float:
    """Return the longest time that this loop was held up until ``task`` was done."""
    longest_s, last = 0.0, time.perf_counter()
    while not task.done():
        await asyncio.sleep(0.001)
        longest_s, last = max(longest_s, time.perf_counter() - last), time.perf_counter()
    return longest_s


async def longest_wait_s(proxy: ProxyProcess, body: bytes) -> float:
    """Send ``body``; return the longest time that /health took meanwhile."""
    sending = asyncio.create_task(proxy.client.post(CHAT, data=io.BytesIO(body)))
    waits_s = []
    while not sending.done():
        started = time.perf_counter()
        async with proxy.client.get("/health") as response:
            assert response.status == 200
        waits_s.append(time.perf_counter() - started)
        await asyncio.sleep(0.002)
    async with sending.result() as response:
        assert response.status == 200
    assert len(waits_s) > 3
    return max(waits_s)


async def test_defect_05_video_and_audio_are_encoded_and_weighed() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "QUJDRA==", "format": "wav"}}
    video = url_part(data_url(b"v" * 90_000, "video/mp4"), "video_url")
    async with ProxyStack(encoders=2) as stack:
        for encoder in stack.encoders:
            encoder.default = fake.after(0.2)
        sending = asyncio.create_task(stack.post(chat(video, sound, url_part("https://a.test/b.mp3", "audio_url"))))
        await stack.until(lambda: sum(e.running for e in stack.encoders) == 3)
        costs = sorted(e.active_cost for e in stack.pools["encode"].endpoints)
        assert costs == [351, 64 + 512]  # 90,000 bytes of video weigh 351 tokens, not 32 times the body
        assert (await sending).status == 200
        kinds = sorted(r.parts[0]["type"] for e in stack.encoders for r in e.requests)
        assert kinds == ["audio_url", "input_audio", "video_url"]


async def test_defect_06_plain_text_spreads() -> None:
    async with ProxyStack(encoders=0, instances=2) as stack:
        for instance in stack.instances:
            instance.default = fake.after(0.2)
        replies = await asyncio.gather(*(stack.post(chat(text="hi")) for _ in range(40)))
        assert [r.status for r in replies] == [200] * 40
        assert [len(i.requests) for i in stack.instances] == [20, 20]
        # And by its length: one long text outweighs many short ones.
        for instance in stack.instances:
            instance.default = fake.after(0.5)
        sending = [asyncio.create_task(stack.post(chat(text=text))) for text in ("x" * 40_000, *["hi"] * 9)]
        await stack.until(lambda: sum(i.running for i in stack.instances) == 10)
        costs = sorted(e.active_cost for e in stack.pools["prefill_decode"].endpoints)
        assert costs == [9 * (1 + 8), 10_000 + 8]
        assert {(await each).status for each in sending} == {200}


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (picture(280, "WEBP"), "image/webp"),
        (picture(280, "WEBP", lossless=True), "image/webp"),
        (picture(280, "JPEG", comment=b"x" * 60_000, exif=b"Exif\0\0" + b"y" * 60_000), "image/jpeg"),
    ],
    ids=["webp", "webp-lossless", "jpeg-late-header"],
)
async def test_defect_07_webp_and_late_jpeg_headers_are_weighed(content: bytes, media_type: str) -> None:
    if media_type == "image/jpeg":
        assert content.index(b"\xff\xc0") > 65_536
    async with ProxyStack() as stack:
        stack.encoders[0].default = fake.after(0.1)
        sending = asyncio.create_task(stack.post(chat(url_part(data_url(content, media_type)))))
        await stack.until(lambda: stack.encoders[0].running == 1)
        assert stack.pools["encode"].endpoints[0].active_cost == 10 * 10
        assert (await sending).status == 200


async def test_defect_08_the_whole_share_is_released() -> None:
    async with ProxyStack(encoders=0, instances=2) as stack:
        for _ in range(200):
            assert (await stack.post(chat(text="x" * 400))).status == 200
        assert [e.active_cost for e in stack.pools["prefill_decode"].endpoints] == [0, 0]
        # With history out of the way, the load in flight decides.
        stack.instances[0].default = stack.instances[1].default = fake.after(0.3)
        first = asyncio.create_task(stack.post(chat(text="x" * 40_000)))
        await stack.until(lambda: sum(i.running for i in stack.instances) == 1)
        busy = next(i for i in stack.instances if i.running)
        before = len(busy.requests)
        await asyncio.gather(*(stack.post(chat(text="short")) for _ in range(5)), first)
        assert len(busy.requests) == before


async def test_defect_10_a_dead_instance_gets_nothing() -> None:
    """Not even a try, once it is known to be dead: neither breaker nor probes have a part in that here."""

    async def failed_attempts() -> list[bytes]:
        lines = (await stack.get("/metrics")).body.splitlines()
        return [line for line in lines if line.startswith(b"epd_proxy_stage_attempts_total") and b'="ok"' not in line]

    async with ProxyStack(encoders=0, instances=2, balance=Balance(breaker_failures=0)) as stack:
        await stack.instances[0].stop()
        replies = await asyncio.gather(*(stack.post(chat()) for _ in range(40)))
        assert [(r.status, bool(r.body)) for r in replies] == [(200, True)] * 40
        assert len(stack.instances[1].requests) == 40
        before = await failed_attempts()
        assert len(before) == 1
        assert [(await stack.post(chat())).status for _ in range(10)] == [200] * 10
        assert await failed_attempts() == before


async def test_defect_11_encoder_load_is_released_on_failure_and_abort() -> None:
    async with ProxyStack(encoders=2) as stack:
        for behaviour in (fake.refuse(500), fake.refuse(400), fake.drop):
            stack.encoders[0].default = stack.encoders[1].default = behaviour
            await stack.post(chat(image_part(), image_part()))
            await stack.until_idle()
        stack.encoders[0].default = stack.encoders[1].default = fake.hang
        for endpoint in stack.pools["encode"].endpoints:
            endpoint.mark_probe(None)
        sending = asyncio.create_task(stack.post(chat(image_part(), image_part(), image_part())))
        await stack.until(lambda: sum(e.running for e in stack.encoders) == 3)
        sending.cancel()
        await stack.until(lambda: sum(e.aborted for e in stack.encoders) == 3)
        await stack.until_idle()


async def test_defect_12_decode_load_is_released_on_abort() -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream(fake.TEXT[:1], end="hang")
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            assert await response.content.readany() == fake.TEXT[0]
            assert stack.pools["prefill_decode"].endpoints[0].active_leases == 1
        await stack.until(lambda: stack.instances[0].aborted == 1)
        await stack.until_idle()
        stack.instances[0].default = fake.hang
        sending = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: stack.instances[0].running == 1)
        sending.cancel()
        await stack.until(lambda: stack.instances[0].aborted == 2)


async def test_defect_13_finished_requests_leave_nothing() -> None:
    async with ProxyStack(encoders=0) as stack:
        body = json.dumps(chat(text="x" * 100_000)).encode()

        async def send(count: int) -> int:
            for _ in range(count):
                assert (await stack.post(body)).status == 200
            stack.instances[0].requests.clear()
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = await send(20)
            grown = await send(40) - before
        finally:
            tracemalloc.stop()
        assert grown < 400_000, f"{grown} bytes kept after 40 requests of 100,000"


async def test_defect_14_a_400_is_passed_on_once() -> None:
    async with ProxyStack(encoders=0, instances=2) as stack:
        for instance in stack.instances:
            instance.default = fake.refuse(400, "max_tokens is too large")
        reply = await stack.post(chat())
        assert (reply.status, reply.error["message"]) == (400, "max_tokens is too large")
        assert sum(len(i.requests) for i in stack.instances) == 1
        streamed = await stack.post(chat(stream=True))
        assert (streamed.status, streamed.error["message"]) == (400, "max_tokens is too large")


async def test_defect_15_no_retry_after_the_stream_began() -> None:
    async with ProxyStack(encoders=0, instances=2) as stack:
        for instance in stack.instances:
            instance.default = fake.stream(fake.TEXT[:2], 0.01, end="cut")
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            body, broken = await read_to_break(response)
        assert broken
        assert body.startswith(b"".join(fake.TEXT[:2]))
        event = body.removeprefix(b"".join(fake.TEXT[:2]))
        assert event.startswith(b"event: error\ndata: {")
        error = json.loads(event.split(b"data: ", 1)[1])["error"]
        assert error["code"] == 502
        assert sum(len(i.requests) for i in stack.instances) == 1


async def test_defect_16_streams_keep_their_type() -> None:
    async with ProxyStack() as stack:
        streamed = await stack.post(chat(image_part(), stream=True))
        assert streamed.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        whole = await stack.post(chat(image_part()))
        assert whole.headers["Content-Type"].startswith("application/json")


async def test_defect_19_the_encoder_generates_one_token() -> None:
    async with ProxyStack() as stack:
        asked = chat(image_part(), n=4, max_completion_tokens=500, max_tokens=500, stream=True,
                     stream_options={"include_usage": True}, tools=[{"type": "function"}], tool_choice="required",
                     logprobs=True)  # fmt: skip
        assert (await stack.post(asked)).status == 200
        sent = stack.encoders[0].requests[0].document
        assert unnamed(sent) == {
            "model": MODEL, "stream": False, "max_tokens": 1, "min_tokens": 1, "max_completion_tokens": 1,
            "messages": [{"role": "user", "content": [asked["messages"][0]["content"][0]]}],
        }  # fmt: skip
        await stack.post(chat(image_part()))
        assert "max_completion_tokens" not in stack.encoders[0].requests[1].document


async def test_defect_20_identity_headers_reach_every_stage() -> None:
    async with ProxyStack() as stack:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        given = {"X-Request-Id": "abc-1", "Authorization": "Bearer key", "traceparent": trace, "tracestate": "a=b"}
        reply = await stack.post(chat(image_part()), headers=given)
        assert reply.headers["X-Request-Id"] == "abc-1"
        encode, decode = (f.requests[0].headers for f in (stack.encoders[0], stack.instances[0]))
        assert (encode["x-request-id"], decode["x-request-id"]) == ("abc-1-encode-0", "abc-1")
        for headers in (encode, decode):
            assert headers["authorization"] == "Bearer key"
            assert (headers["traceparent"], headers["tracestate"]) == (trace, "a=b")
        await stack.post(chat())
        assert "authorization" not in stack.instances[0].requests[1].headers


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_defect_21_a_client_cannot_choose_transfer_params(path: str) -> None:
    async with ProxyStack() as stack:
        params = {"do_remote_prefill": True, "metaserver": "http://attacker.test/"}
        asked = {"prompt": "x", **chat(image_part())}
        bad = {**asked, "kv_transfer_params": params, "ec_transfer_params": params,
               "vllm_xargs": {"kv_transfer_params": "x", "kept": 1}}  # fmt: skip
        assert (await stack.post(bad, path)).status == 200
        for request in (*stack.encoders[0].requests, *stack.instances[0].requests):
            assert b"transfer_params" not in request.body
            assert b"attacker" not in request.body
        assert unnamed(stack.instances[0].requests[0].document) == {**asked, "vllm_xargs": {"kept": 1}}


async def test_defect_24_every_wait_has_an_end() -> None:
    limits = Timeouts(encode_s=0.2, first_byte_s=0.3, idle_s=0.2)
    async with ProxyStack(timeouts=limits, encode_fallback="off") as stack:
        stack.encoders[0].script.append(fake.hang)
        assert (await stack.post(chat(image_part()))).status == 503
        stack.instances[0].script.append(fake.hang)
        reply = await stack.post(chat())
        assert (reply.status, reply.error["type"]) == (504, "GatewayTimeout")
        stack.instances[0].script.append(fake.stream(fake.TEXT[:1], end="hang"))
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()


@pytest.mark.parametrize("cut", range(1, 5))
async def test_defect_25_bytes_are_relayed_as_they_came(cut: int) -> None:
    event = fake.chunk("🍵" * 600)
    at = event.index("🍵".encode()) + cut
    pieces = (event[:at], event[at : at + 1023], event[at + 1023 :], fake.DONE)
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream(pieces, 0.01)
        assert (await stack.post(chat(stream=True))).body == event + fake.DONE


async def test_defect_26_processor_options_reach_the_encoder() -> None:
    async with ProxyStack() as stack:
        options = {"mm_processor_kwargs": {"max_pixels": 50_176}, "media_io_kwargs": {"video": {"num_frames": 4}}}
        assert (await stack.post(chat(image_part(), image_part(), **options))).status == 200
        for request in stack.encoders[0].requests:
            assert {name: request.document[name] for name in options} == options


async def test_a_body_in_which_nothing_changed_is_not_written_anew() -> None:
    async with ProxyStack() as stack:
        for part in (url_part("https://a.test/cat.png"), {"type": "text", "text": "no picture"}):
            body = (
                b'{ "messages":[{"role":"user", "content":[%s]}],\n\t"big": 12345678901234567890123456, "a":1, "a":2}'
            )
            body %= json.dumps(part).encode()
            assert (await stack.post(body)).status == 200
            assert stack.instances[0].requests.pop().body == body
        assert stack.encoders[0].requests[0].parts == [url_part("https://a.test/cat.png")]


async def test_one_item_a_request_all_at_once_on_the_least_loaded_encoder() -> None:
    async with ProxyStack(encoders=2, retry=Retry(max_attempts=1)) as stack:
        for encoder in stack.encoders:
            encoder.default = fake.after(0.2)
        parts = [image_part(picture(560)), *(image_part(picture(28, color=c)) for c in ("red", "lime", "blue"))]
        sending = asyncio.create_task(stack.post(chat(*parts)))
        await stack.until(lambda: sum(e.running for e in stack.encoders) == 4)
        # The big one weighs 400 tokens, the small ones 1 each: they keep away from it.
        assert sorted(e.running for e in stack.encoders) == [1, 3]
        assert stack.instances[0].requests == []
        assert (await sending).status == 200
        assert [len(r.parts) for e in stack.encoders for r in e.requests] == [1] * 4
        assert len(stack.instances[0].requests) == 1
