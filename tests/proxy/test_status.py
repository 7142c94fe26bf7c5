"""What operators and orchestrators ask: alive, ready, and the page for people."""

import asyncio
import re

from epd_proxy.config import Health
from epd_proxy.staging import Balance
from fakes import instances as fake
from fakes.proxy_stack import CHAT, ProxyStack, chat


async def rows(stack: ProxyStack) -> list[list[str]]:
    """The table of the status page."""
    page = (await stack.get("/status")).body.decode()
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)[1:]]


async def test_the_page_shows_each_instance() -> None:
    async with ProxyStack(instances=2, health=Health(interval_s=0.05), balance=Balance(breaker_failures=1)) as stack:
        [encoder], [first, second] = stack.encoders, stack.instances
        assert await rows(stack) == [
            ["encode", encoder.url, "up", "closed", "0", "0"],
            ["prefill_decode", first.url, "up", "closed", "0", "0"],
            ["prefill_decode", second.url, "up", "closed", "0", "0"],
        ]
        stack.membership.drain("prefill_decode", second.url)
        first.script.append(fake.refuse(500))
        assert (await stack.post(chat())).status == 500
        first.script.append(fake.hang)
        sending = asyncio.create_task(stack.post(chat(text="x" * 400, max_tokens=50)))
        await stack.until(lambda: first.running == 1)
        await encoder.stop()
        await stack.until(lambda: not stack.pools["encode"].ready)
        assert await rows(stack) == [
            ["encode", encoder.url, "down", "closed", "0", "0"],
            ["prefill_decode", first.url, "up", "open", "1", "150"],
            ["prefill_decode", second.url, "up, drained", "closed", "0", "0"],
        ]
        reply = await stack.get("/status")
        assert reply.headers["Content-Type"].startswith("text/html")
        assert b"<h1>not ready</h1><p>encode: 0 of 1 up</p>" in reply.body
        sending.cancel()


async def test_an_address_is_no_markup() -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.pools["encode"].add("http://a.test/<b>&")
        assert (await rows(stack))[0][1] == "http://a.test/&lt;b&gt;&amp;"


async def test_who_drains_is_not_ready() -> None:
    """Balancers in front of it have connections open, which go on to be answered."""
    async with ProxyStack(encoders=0) as stack:
        assert (await stack.get("/ready")).document["status"] == "ready"
        stack.instances[0].default = fake.stream(fake.TEXT, 0.1)
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            draining = asyncio.create_task(stack.handlers.drain(20))
            await stack.until(lambda: stack.handlers.draining)
            ready = await stack.get("/ready")
            assert (ready.status, ready.document["reasons"]) == (503, ["the proxy is shutting down"])
            assert (await stack.get("/health")).status == 200
            assert (await response.read()).endswith(fake.DONE)
        await draining
