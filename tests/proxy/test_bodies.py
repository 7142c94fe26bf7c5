"""What clients send and take has bounds: in memory, and in time."""

import asyncio
import json
import logging
import os

import aiohttp
import pytest
from aiohttp import web

from epd_proxy.config import MIB, Limits, Timeouts
from fakes import instances as fake
from fakes.instances import FakeInstance
from fakes.proxy_process import ProxyProcess
from fakes.proxy_stack import CHAT, ProxyStack, chat, data_url, url_part

LIMITS = Limits(body_bytes=MIB, bodies_bytes=MIB)
LARGE = json.dumps(chat(text="x" * (700 * 1024))).encode()


def resident_mib(pid: int, field: str = "VmRSS") -> float:
    """Resident memory of a process, or with VmHWM its peak."""
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


async def in_pieces(body: bytes) -> object:
    """Send without announcing the length."""
    for start in range(0, len(body), 64 * 1024):
        yield body[start : start + 64 * 1024]


@pytest.mark.parametrize("announced", [True, False])
async def test_beyond_the_budget_it_is_a_503_until_there_is_room(announced: bool) -> None:
    async with ProxyStack(encoders=0, limits=LIMITS) as stack:

        async def send() -> aiohttp.ClientResponse:
            async with stack.client.post(CHAT, data=LARGE if announced else in_pieces(LARGE)) as response:
                await response.read()
                return response

        stack.instances[0].script.append(fake.after(0.5))
        first = asyncio.create_task(send())
        await stack.until(lambda: stack.instances[0].running == 1)
        refused = await send()
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert (await stack.post(chat(text="small"))).status == 200
        assert (await first).status == 200
        assert (await send()).status == 200
        assert stack.handlers.bodies.held_bytes == 0


async def test_a_stream_that_began_holds_nothing() -> None:
    async with ProxyStack(encoders=0, limits=LIMITS) as stack:
        stack.instances[0].script.append(fake.stream(fake.TEXT[:1], end="hang"))
        body = json.dumps(chat(text="x" * (700 * 1024), stream=True)).encode()
        async with stack.client.post(CHAT, data=body) as response:
            assert await response.content.readany() == fake.TEXT[0]
            assert stack.handlers.bodies.held_bytes == 0
            assert (await stack.post(LARGE)).status == 200


async def test_a_client_that_leaves_within_its_body_gives_its_share_back() -> None:
    async with ProxyStack(encoders=0, limits=LIMITS) as stack:
        writer = await begin(stack, 900_000, b"{")
        await stack.until(lambda: stack.handlers.bodies.held_bytes == 900_000)
        assert (await stack.post(LARGE)).status == 503
        writer.close()
        await stack.until(lambda: stack.handlers.bodies.held_bytes == 0)
        assert (await stack.post(LARGE)).status == 200


async def begin(stack: ProxyStack, length: int, start: bytes, limit: int = 2**16) -> asyncio.StreamWriter:
    """Open a connection and send a head and the first bytes of a body. What is answered is not read."""
    port = int(stack.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
    writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), length) + start)
    return writer


async def test_many_large_bodies_at_once_stay_within_6_times_the_budget() -> None:
    arguments = ("--max-body-mib", "32", "--max-bodies-mib", "80", "--log-level", "error")
    body = json.dumps(chat(url_part(data_url(os.urandom(18 * MIB))), stream=True)).encode()
    async with FakeInstance(fake.after(1)) as encoder, FakeInstance(fake.stream(fake.TEXT[:1], end="hang")) as instance:
        urls = ("--encode", encoder.url, "--prefill-decode", instance.url)
        async with ProxyProcess(*urls, *arguments) as proxy:
            before_mib = resident_mib(proxy.process.pid)
            replies = await asyncio.gather(*(proxy.client.post(CHAT, data=in_pieces(body)) for _ in range(8)))
            peak_mib = resident_mib(proxy.process.pid, "VmHWM") - before_mib
            rest_mib = resident_mib(proxy.process.pid) - before_mib
            statuses = [reply.status for reply in replies]
            for reply in replies:
                reply.close()
    assert set(statuses) == {200, 503}
    assert peak_mib < 6 * 80, statuses
    # The streams have begun and go on: no body is kept for them.
    assert rest_mib < 0.8 * len(body) / MIB * statuses.count(200), statuses


@pytest.mark.parametrize("trickles", [False, True])
async def test_a_body_that_never_ends_is_a_408(trickles: bool) -> None:
    async with ProxyStack(encoders=0, timeouts=Timeouts(body_idle_s=0.5)) as stack:
        port = int(stack.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{" % CHAT.encode())
        answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        async with asyncio.timeout(10):
            while trickles and not answer.done():
                writer.write(b" ")
                await asyncio.sleep(0.05)
            head = await answer
        assert head.startswith(b"HTTP/1.1 408 ")
        assert stack.handlers.bodies.held_bytes == 0
        assert stack.instances[0].requests == []
        writer.close()


async def large_answer(*_arguments: object) -> web.Response:
    return web.Response(body=b"x" * (30 * MIB), content_type="application/json")


ENDLESS = fake.stream([fake.chunk("x" * MIB)] * 30, end="hang")


@pytest.mark.parametrize("behaviour", [large_answer, ENDLESS], ids=["whole", "stream"])
async def test_a_client_that_stops_reading_is_cut_off(
    behaviour: fake.Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "epd_proxy.access")
    async with ProxyStack(encoders=0, timeouts=Timeouts(write_idle_s=0.5)) as stack:
        stack.instances[0].default = behaviour
        body = json.dumps(chat()).encode()
        writer = await begin(stack, len(body), body, limit=1024)
        await stack.until(lambda: any("took too little" in str(getattr(r, "fields", "")) for r in caplog.records))
        await stack.until_idle()
        await stack.until(lambda: not stack.app.listener.connections)
        writer.close()


async def test_a_large_whole_answer_arrives_whole() -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = large_answer
        reply = await stack.post(chat())
        assert (reply.status, len(reply.body), reply.headers["Content-Length"]) == (200, 30 * MIB, str(30 * MIB))
