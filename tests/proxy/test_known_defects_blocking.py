"""Defect 4 of today's example proxies: what takes long held up the loop, and with it every other request."""

import asyncio
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from epd_proxy.access import AccessRecord
from epd_proxy.config import ProxyConfig, Topology
from epd_proxy.flows import Job, Stages
from epd_proxy.flows.fanout import EncodeFanout
from epd_proxy.known import KnownItems
from epd_proxy.metrics import Metrics
from epd_proxy.plan import build
from epd_proxy.pool import Pool
from epd_proxy.protocol import CHAT as CHAT_API
from epd_proxy.protocol import decode_body, parse_request, pending_body
from epd_proxy.upstream import Upstream
from fakes.instances import FakeInstance
from fakes.proxy_process import ProxyProcess
from fakes.proxy_stack import CHAT, ITEM_KEY, chat, data_url, picture, url_part


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
