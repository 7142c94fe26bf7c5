"""Layerwise instances that fail: a right answer or a clear error, and no block is kept."""

import asyncio
from typing import Any

import pytest

from epd_proxy.config import Health, Timeouts
from fakes import instances as fake
from fakes.layerwise import call_back, pushes_kv, waits_for_kv
from fakes.layerwise_stack import metrics, released, split_stack
from fakes.proxy_stack import CHAT, chat, image_part, read_to_break

pytestmark = pytest.mark.usefixtures("short_waits")


# Prefill.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", ["stopped", fake.refuse(503), fake.refuse(429)])
async def test_a_prefill_that_never_began_is_sent_elsewhere_as_it_is(fault: Any, streamed: bool) -> None:
    async with split_stack(prefills=2) as stack:
        if fault == "stopped":
            await stack.prefills[0].stop()
        else:
            stack.prefills[0].default = fault
        for _ in range(2):
            assert (await stack.post(chat(stream=streamed))).status == 200
        assert len(stack.prefills[1].requests) == len(stack.decodes[0].requests) == 2
        assert stack.link.released == []


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_prefill_instance_says_itself_when_to_come_again(status: int) -> None:
    async with split_stack() as stack:
        stack.prefills[0].script.append(fake.refuse(status, headers={"Retry-After": "17"}))
        reply = await stack.post(chat())
        assert (reply.status, reply.headers["Retry-After"]) == (503, "17")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", [fake.drop, fake.refuse(500), fake.cut_json])
async def test_defect_17_a_prefill_that_may_have_begun_starts_the_request_anew(
    fault: fake.Behaviour, streamed: bool
) -> None:
    """Sent again as it is it would write over what decode wrote; a new attempt has blocks of its own."""
    async with split_stack(prefills=2) as stack:
        for prefill in stack.prefills:
            prefill.script.append(fault)
        stack.prefills[1].script.clear()
        stack.pools["prefill"].endpoints[1].granted_total = 1  # so that the first one is asked first
        assert (await stack.post(chat(stream=streamed))).status == 200
        first, second = (r.headers["X-Request-Id"] for r in stack.decodes[0].requests)
        for request in stack.decodes[0].requests:  # decode's parameters alone, nothing of what prefill was sent
            assert set(request.document["kv_transfer_params"]) == {
                "do_remote_decode",
                "do_remote_prefill",
                "metaserver",
            }
            assert request.document["max_tokens"] == 8
        assert stack.link.prefilled == [second]
        await released(stack, "released")
        assert stack.link.released == [first]


async def test_decode_is_not_asked_while_every_prefill_is_down() -> None:
    """It would hold blocks for KV that cannot come."""
    async with split_stack() as stack:
        stack.pools["prefill"].endpoints[0].mark_unreachable("refused")
        reply = await stack.post(chat())
        assert (reply.status, reply.error["message"]) == (
            503, "no prefill instance can take the request now: 0 of 1 up"
        )  # fmt: skip
        assert stack.decodes[0].requests == []


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", [fake.drop, fake.refuse(500), fake.refuse(503), fake.refuse(500, body=b"<html>")])
async def test_defect_18_without_another_prefill_it_is_a_503(fault: fake.Behaviour, streamed: bool) -> None:
    async with split_stack() as stack:
        stack.prefills[0].script.append(fault)
        reply = await stack.post(chat(stream=streamed))
        assert (reply.status, reply.headers["Retry-After"], bool(reply.error["message"])) == (503, "1", True)
        assert stack.decodes[0].aborted == 1
        await released(stack, "released")
        assert (await stack.post(chat(stream=streamed))).status == 200


async def test_blocks_are_released_when_prefill_is_back() -> None:
    async with split_stack(health=Health(interval_s=1)) as stack:
        await stack.prefills[0].stop()
        assert (await stack.post(chat())).status == 503
        await stack.until(lambda: not stack.pools["prefill"].ready)
        await asyncio.sleep(0.5)
        assert len(stack.link.held) == 1
        await stack.prefills[0].start()
        await released(stack, "released")


async def test_a_refusal_by_prefill_is_the_clients_answer() -> None:
    async with split_stack(prefills=2) as stack:
        for prefill in stack.prefills:
            prefill.script.append(fake.refuse(400, "prompt too long"))
        reply = await stack.post(chat())
        assert (reply.status, reply.error["message"]) == (400, "prompt too long")
        assert sum(len(p.requests) for p in stack.prefills) == 1
        await released(stack, "released")


async def test_a_prefill_that_takes_too_long_is_not_tried_again() -> None:
    async with split_stack(prefills=2, timeouts=Timeouts(prefill_s=0.3)) as stack:
        for prefill in stack.prefills:
            prefill.script.append(fake.hang)
        reply = await stack.post(chat())
        assert reply.status == 504
        assert sum(p.aborted for p in stack.prefills) == 1
        assert sum(len(p.requests) for p in stack.prefills) <= 2  # the second one is the release
        await released(stack, "released")


@pytest.mark.parametrize("prefills", [1, 2])
async def test_prefill_that_dies_with_layers_unsent_after_its_answer(prefills: int) -> None:
    """Its 200 does not mean that the KV arrived."""
    async with split_stack(prefills=prefills, health=Health(interval_s=0.1)) as stack:
        stack.prefills[0].default = fake.answer  # 200, and nothing pushed
        if prefills == 2:
            stack.pools["prefill"].endpoints[1].granted_total = 1
        sending = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: "prefill" not in repr(stack.flow) and len(stack.prefills[0].requests) == 1)
        await stack.prefills[0].stop()
        reply = await sending
        if prefills == 2:
            assert reply.status == 200
        else:
            assert (reply.status, "went down" in reply.error["message"]) == (503, True)
            stack.prefills[0].default = pushes_kv(stack.link)
            await stack.prefills[0].start()
        await released(stack, "released")


async def test_a_prefill_that_is_only_slow_to_probes_costs_nothing() -> None:
    async with split_stack() as stack:
        stack.decodes[0].default = waits_for_kv(stack.link, fake.after(1.5))
        sending = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: len(stack.link.prefilled) == 1)
        for _ in range(2):
            stack.pools["prefill"].endpoints[0].mark_probe("slow")
        assert (await sending).status == 200


async def test_a_stream_that_does_not_begin_after_prefill_is_given_up() -> None:
    async with split_stack(timeouts=Timeouts(handover_s=0.3)) as stack:
        stack.prefills[0].script.append(fake.answer)
        assert (await stack.post(chat(stream=True))).status == 504
        await released(stack, "released")


# Decode.


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", [fake.drop, fake.refuse(500), fake.empty, "stopped"])
async def test_decode_that_fails_before_its_first_byte_is_left_for_another(fault: Any, streamed: bool) -> None:
    async with split_stack(decodes=2) as stack:
        stack.pools["decode"].endpoints[1].granted_total = 1
        if fault == "stopped":
            await stack.decodes[0].stop()
        else:
            stack.decodes[0].default = waits_for_kv(stack.link, fault)
        assert (await stack.post(chat(stream=streamed))).status == 200
        assert len(stack.decodes[1].requests) == 1
        ids = [r.headers["X-Request-Id"] for d in stack.decodes for r in d.requests]
        assert len(ids) == len(set(ids)) == len(stack.link.prefilled)


async def test_no_prefill_goes_on_for_a_decode_that_is_gone() -> None:
    async def die(instance: fake.FakeInstance, request: fake.web.Request, recorded: fake.Recorded) -> Any:
        held = stack.link.allocate(recorded.headers["X-Request-Id"])
        await call_back(recorded.document["kv_transfer_params"]["metaserver"], held, instance)
        await stack.until(lambda: stack.prefills[0].running == 1)
        stack.link.held.clear()
        return await fake.drop(instance, request, recorded)

    async with split_stack() as stack:
        stack.prefills[0].default = fake.hang
        stack.decodes[0].default = die
        assert (await stack.post(chat())).status == 502
        await stack.until(lambda: stack.prefills[0].aborted == 1)
        await stack.until_idle()
        assert len(stack.prefills[0].requests) == 1  # no release either


async def test_decode_that_dies_while_the_items_are_encoded_gets_no_prefill() -> None:
    async with split_stack(encoders=1) as stack:
        stack.encoders[0].default = fake.after(0.5)
        stack.decodes[0].default = fake.drop
        assert (await stack.post(chat(image_part()))).status == 502
        await asyncio.sleep(0.6)
        assert stack.prefills[0].requests == []
        assert stack.encoders[0].aborted == 1


async def test_decode_that_never_calls_back() -> None:
    async with split_stack(decodes=2, timeouts=Timeouts(callback_s=0.5)) as stack:
        for decode in stack.decodes:
            decode.default = fake.hang
        assert (await stack.post(chat(stream=True))).status == 504
        assert sum(d.aborted for d in stack.decodes) == sum(len(d.requests) for d in stack.decodes) == 1
        await released(stack, "not_needed")
        assert stack.prefills[0].requests == []


async def test_decode_that_went_down_is_not_waited_for() -> None:
    async with split_stack(decodes=2, health=Health(interval_s=0.1)) as stack:
        stack.pools["decode"].endpoints[1].granted_total = 1
        stack.decodes[0].default = fake.hang
        sending = asyncio.create_task(stack.post(chat()))
        await stack.until(lambda: stack.decodes[0].running == 1)
        stack.decodes[0].healthy = False
        assert (await sending).status == 200
        assert len(stack.decodes[1].requests) == 1


async def test_decode_that_refuses_is_passed_on_and_nothing_is_prefilled() -> None:
    async with split_stack(encoders=1) as stack:
        stack.encoders[0].default = fake.hang
        stack.decodes[0].default = fake.refuse(400, "too long")
        reply = await stack.post(chat(image_part()))
        assert (reply.status, reply.error["message"]) == (400, "too long")
        assert stack.prefills[0].requests == []
        await stack.until_idle()
        assert "epd_proxy_pending_callbacks 0.0" in await metrics(stack)


async def test_a_stream_that_breaks_after_it_began() -> None:
    async with split_stack(decodes=2) as stack:
        for decode in stack.decodes:
            decode.default = waits_for_kv(stack.link, fake.stream(fake.TEXT[:2], 0.01, end="cut"))
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            body, broken = await read_to_break(response)
        assert broken
        assert b"event: error" in body
        assert sum(len(d.requests) for d in stack.decodes) == 1


# Encode.


async def test_a_refused_item_ends_decode_and_frees_its_blocks() -> None:
    async with split_stack(encoders=1) as stack:
        stack.encoders[0].default = fake.after(0.2, fake.refuse(400, "bad picture"))
        reply = await stack.post(chat(image_part()))
        assert (reply.status, reply.error["message"]) == (400, "bad picture")
        assert stack.decodes[0].aborted == 1
        await released(stack, "released")


async def test_without_encoder_prefill_encodes() -> None:
    async with split_stack(encoders=1) as stack:
        await stack.encoders[0].stop()
        assert (await stack.post(chat(image_part()))).status == 200
