"""The defects of today's example proxies in weighing, spreading and giving back load, by their numbers."""

import asyncio
import gc
import json
import tracemalloc

import pytest

from epd_proxy.config import Retry
from epd_proxy.staging import Balance
from fakes import instances as fake
from fakes.proxy_stack import CHAT, ProxyStack, chat, data_url, image_part, picture, url_part


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
