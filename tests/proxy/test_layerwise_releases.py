"""Layerwise requests whose client leaves, and a proxy that stops: decode's blocks are released and nothing is left."""

import asyncio
import random
from typing import Any

import pytest

from epd_proxy.config import Timeouts
from fakes import instances as fake
from fakes.layerwise import call_back, pushes_kv, waits_for_kv
from fakes.layerwise_stack import metrics, released, split_stack
from fakes.proxy_stack import CHAT, ProxyStack, chat, image_part, read_to_break

pytestmark = pytest.mark.usefixtures("short_waits")


async def leave(stack: ProxyStack, condition: Any) -> None:
    sending = asyncio.create_task(stack.post(chat(image_part())))
    await stack.until(condition)
    sending.cancel()
    await asyncio.wait((sending,))


async def test_a_client_that_leaves_while_the_items_are_encoded() -> None:
    async with split_stack(encoders=1) as stack:
        stack.encoders[0].default = fake.hang
        await leave(stack, lambda: len(stack.link.held) == 1)
        await stack.until(lambda: stack.encoders[0].aborted == stack.decodes[0].aborted == 1)
        await released(stack, "released")
        assert len(stack.prefills[0].requests) == 1


async def test_a_client_that_leaves_during_prefill() -> None:
    async with split_stack(encoders=1, prefills=2) as stack:
        for prefill in stack.prefills:
            prefill.script.append(fake.hang)
        await leave(stack, lambda: sum(p.running for p in stack.prefills) == 1)
        await released(stack, "released")
        assert sum(p.aborted for p in stack.prefills) == stack.decodes[0].aborted == 1
        # To the instance that was at it: only there is it sure to come after what was sent before.
        assert sorted(len(p.requests) for p in stack.prefills) == [0, 2]


@pytest.mark.parametrize("calls", [True, False])
async def test_a_client_that_leaves_before_the_callback(calls: bool) -> None:
    """Decode may call all the same when it had taken the request already."""

    async def slow(instance: fake.FakeInstance, request: fake.web.Request, recorded: fake.Recorded) -> Any:
        try:
            await asyncio.sleep(3600)
        finally:
            if calls:
                held = stack.link.allocate(recorded.headers["X-Request-Id"])
                stack.link.leave(held)
                url = recorded.document["kv_transfer_params"]["metaserver"]
                late.append(asyncio.create_task(call_back(url, held, instance)))

    late: list[asyncio.Task[int]] = []
    async with split_stack(encoders=1) as stack:
        stack.decodes[0].default = slow
        await leave(stack, lambda: stack.decodes[0].running == 1)
        await stack.until(lambda: stack.decodes[0].aborted == 1)
        assert len(stack.flow._background) == 1  # type: ignore[attr-defined]
        await released(stack, "released" if calls else "not_needed")
        assert [await each for each in late] == [200] * calls


async def test_a_client_that_leaves_while_decode_generates() -> None:
    async with split_stack() as stack:
        stack.decodes[0].default = waits_for_kv(stack.link, fake.stream(fake.TEXT[:1], end="hang"))
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            assert await response.content.readany() == fake.TEXT[0]
        await stack.until(lambda: stack.decodes[0].aborted == 1)
        await stack.until_idle()
        assert stack.link.released == []
        assert stack.link.held == {}


async def test_a_release_that_is_refused_or_never_possible_has_an_end() -> None:
    for fault, outcome in ((fake.refuse(404), "refused"), (fake.drop, "expired")):
        async with split_stack(timeouts=Timeouts(release_s=0.6)) as stack:
            stack.prefills[0].default = fault
            assert (await stack.post(chat())).status in (404, 503)
            await stack.until_idle()
            assert f'epd_proxy_releases_total{{outcome="{outcome}"}} 1.0' in await metrics(stack)


async def test_no_release_goes_to_a_decode_that_is_down() -> None:
    async with split_stack(timeouts=Timeouts(release_s=1)) as stack:
        stack.prefills[0].default = fake.hang
        await leave(stack, lambda: stack.prefills[0].running == 1)
        stack.pools["decode"].endpoints[0].mark_unreachable("gone")
        await stack.until_idle()
        assert len(stack.prefills[0].requests) == 1


async def test_shutdown_ends_what_is_left() -> None:
    stack = split_stack()
    async with stack:
        stack.prefills[0].default = fake.hang
        await leave(stack, lambda: stack.prefills[0].running == 1)
        await stack.until(lambda: len(stack.prefills[0].requests) == 2)
        flow, metaserver = stack.flow, stack.metaserver
        await flow.close()
        assert len(flow._background) == 0  # type: ignore[attr-defined]
        assert metaserver is not None
        assert metaserver.pending == 0


async def test_nothing_is_left_after_many_mixed_requests() -> None:
    chance = random.Random(11)
    faults = [fake.drop, fake.refuse(500), fake.refuse(503), fake.refuse(400), fake.empty]
    async with split_stack(encoders=1, prefills=3, decodes=3) as stack:

        def sometimes(well: fake.Behaviour) -> fake.Behaviour:
            async def behave(instance: fake.FakeInstance, request: fake.web.Request, recorded: fake.Recorded) -> Any:
                is_release = len(recorded.body) < 4000 and b'"remote_block_ids":[[0,' in recorded.body
                bad = chance.random() < 0.15 and not is_release
                return await (chance.choice(faults) if bad else well)(instance, request, recorded)

            return behave

        stack.encoders[0].default = sometimes(fake.after(0.01))
        for prefill in stack.prefills:
            prefill.default = sometimes(pushes_kv(stack.link, 0.01))
        for decode in stack.decodes:
            decode.default = sometimes(waits_for_kv(stack.link, queue_s=0.005))

        async def send() -> None:
            parts = [image_part()] * chance.randrange(2)
            try:
                async with asyncio.timeout(chance.choice((0.01, 0.05, 10))):
                    async with stack.client.post(CHAT, json=chat(*parts, stream=chance.random() < 0.5)) as response:
                        body, broken = await read_to_break(response)
                        assert body
                        assert broken == (b"event: error" in body)
            except TimeoutError:
                pass

        for _ in range(5):
            await asyncio.gather(*(send() for _ in range(40)))
            for pool in stack.pools.values():
                for endpoint in pool.endpoints:
                    endpoint.mark_probe(None)
        await stack.until_idle()
        assert stack.link.held == {}
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith(("encode ", "prefill ", "decode "))]
