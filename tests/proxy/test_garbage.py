"""A request that fails leaves nothing of its size behind, though the collector looks seldom (epd_proxy.memory)."""

import asyncio
import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web

from epd_proxy.config import Timeouts
from epd_proxy.errors import BackendError
from epd_proxy.protocol import InferenceRequest
from epd_proxy.relay import Answer
from epd_proxy.upstream import Call, Upstream
from fakes import instances as fake
from fakes.instances import Behaviour, FakeInstance, Recorded
from fakes.proxy_stack import CHAT, ProxyStack, chat, image_part
from fakes.wire import Peer, WireBackend

REQUESTS = 5
# What the loop, the client and the frame that has just ended may still hold.
RECENT = 2


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held() -> int:
    """Requests whose bodies are in memory."""
    return sum(type(each) is InferenceRequest for each in gc.get_objects())


STACKS: dict[str, dict[str, Any]] = {
    "colocated": {},
    "layerwise": {"prefills": 1, "decodes": 1},
}


async def assert_nothing_is_kept(stack: ProxyStack, statuses: range) -> None:
    """Ask about pictures; the requests are gone when their answers, of one of these statuses, are here."""
    for _ in range(REQUESTS):
        assert (await stack.post(chat(image_part()))).status in statuses
        await stack.until_idle()
    assert held() <= RECENT


@pytest.mark.parametrize("name", STACKS)
async def test_a_request_that_the_client_gave_up(name: str) -> None:
    async with ProxyStack(**STACKS[name]) as stack:
        for _ in range(REQUESTS):
            stack.encoders[0].script.append(fake.hang)
            asked = len(stack.encoders[0].requests)
            asking = asyncio.create_task(stack.post(chat(image_part())))
            await stack.until(lambda asked=asked: len(stack.encoders[0].requests) > asked)
            asking.cancel()
            await asyncio.wait((asking,))
            await stack.until_idle()
        assert held() <= RECENT


@pytest.mark.parametrize("name", STACKS)
async def test_a_request_that_no_instance_answers(name: str) -> None:
    async with ProxyStack(**STACKS[name]) as stack:
        (stack.decodes or stack.instances)[0].default = fake.drop
        await assert_nothing_is_kept(stack, range(500, 600))


async def test_a_request_whose_encoder_failed() -> None:
    """It is answered all the same, and nobody is told of the failure."""
    async with ProxyStack() as stack:
        stack.encoders[0].default = fake.drop
        await assert_nothing_is_kept(stack, range(200, 201))
        assert stack.encoders[0].requests


async def test_a_request_whose_first_prefill_failed() -> None:
    """Another one is asked, and the client has its answer."""
    async with ProxyStack(prefills=2, decodes=1) as stack:
        stack.prefills[0].default = fake.drop
        await assert_nothing_is_kept(stack, range(200, 201))
        assert stack.prefills[0].requests


async def test_an_answer_that_failed_is_not_kept_while_another_instance_answers() -> None:
    """It may be large, and the other may take long."""
    async with ProxyStack(instances=2) as stack:
        asked: list[str] = []
        for instance in stack.instances:
            instance.default = refuse_first(asked)
        asking = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: len(asked) == 2)
        assert sum(type(each) is Answer for each in gc.get_objects()) == 1
        asking.cancel()
        await asyncio.wait((asking,))


def refuse_first(asked: list[str]) -> Behaviour:
    """Refuse the first of all requests, and never answer another."""

    async def behave(instance: FakeInstance, request: web.Request, recorded: Recorded) -> web.StreamResponse:
        asked.append(instance.url)
        return await (fake.refuse(503, "busy") if len(asked) == 1 else fake.hang)(instance, request, recorded)

    return behave


async def drops(peer: Peer) -> None:
    await peer.request()
    peer.reset()


async def says_nothing(peer: Peer) -> None:
    await peer.until_closed()


@pytest.mark.parametrize(("script", "limit_s"), [(drops, 5.0), (says_nothing, 0.05)])
async def test_a_body_whose_backend_failed(script: Any, limit_s: float) -> None:
    upstream = Upstream(Timeouts())
    await upstream.start()
    body = bytes(100_000)
    before = sys.getrefcount(body)

    async def ask(url: str) -> None:
        with pytest.raises(BackendError):
            await upstream.send(url, Call(CHAT, [], limit_s, body=body))

    async with WireBackend(script) as backend:
        for _ in range(REQUESTS):
            await ask(backend.url)
        await asyncio.sleep(0.1)
        assert sys.getrefcount(body) <= before
    await upstream.close()


async def test_a_connection_whose_client_left() -> None:
    """A large body of one that left is not kept until garbage is looked for."""
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].script.extend([fake.hang] * REQUESTS)
        for _ in range(REQUESTS):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
            body = b'{"model": "x", "messages": [{"role": "user", "content": "%b"}]}' % (b"x" * 100_000)
            writer.write(
                b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body
            )
            await stack.until(lambda: stack.instances[0].running > 0)
            writer.close()
            await stack.until_idle()
            await stack.until(lambda: stack.instances[0].running == 0)
            del reader, writer
        assert held() <= RECENT
