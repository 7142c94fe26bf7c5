"""With consumers that wait, an instance has the request while its items are encoded."""

import asyncio
import json
from typing import Any

import pytest

from epd_proxy.protocol import CHAT, parse_request, pending_body
from epd_proxy.staging import Items
from fakes import instances as fake
from fakes.proxy_stack import COMPLETIONS, ITEM_KEY, ProxyStack, chat, image_part

WAITING = Items(consumers_wait="on")
PENDING = {"ec_items_pending": 1}


async def test_encode_and_answer_run_at_once() -> None:
    async with ProxyStack(items=WAITING) as stack:
        stack.encoders[0].default = stack.instances[0].default = fake.after(0.3)
        sending = asyncio.create_task(stack.post(chat(image_part(), image_part())))
        await stack.until(lambda: (stack.encoders[0].running, stack.instances[0].running) == (2, 1))
        assert (await sending).status == 200
        [request] = stack.instances[0].requests
        assert request.document["vllm_xargs"] == PENDING
        assert [part["uuid"] for part in request.parts[:2]] == [r.parts[0]["uuid"] for r in stack.encoders[0].requests]


async def test_it_is_off_unless_asked_for_and_never_on_a_prefill_instance() -> None:
    async with ProxyStack() as plain, ProxyStack(prefills=1, decodes=1, items=WAITING) as split:
        for stack in (plain, split):
            for asked in (chat(image_part()), chat(image_part(), n=2)):
                assert (await stack.post(asked)).status == 200
            for request in [r for each in stack.fakes for r in each.requests]:
                assert "vllm_xargs" not in request.document


async def test_without_items_to_encode_the_body_stays_as_it_is() -> None:
    async with ProxyStack(items=WAITING) as stack:
        body = json.dumps(chat(temperature=0)).encode()
        part = image_part()
        for asked, path in ((body, CHAT.path), ({"prompt": "x"}, COMPLETIONS), (chat(part), CHAT.path)):
            assert (await stack.post(asked, path)).status == 200
        assert stack.instances[0].requests[0].body == body
        assert stack.instances[0].requests[2].document["vllm_xargs"] == PENDING
        assert (await stack.post(chat(part))).status == 200  # known by now
        await stack.encoders[0].stop()
        for _ in range(2):  # found out, then known to be down
            assert (await stack.post(chat(image_part()))).status == 200
        for request in stack.instances[0].requests[3:]:
            assert request is stack.instances[0].requests[4] or "vllm_xargs" not in request.document


async def test_an_item_that_will_not_come_is_not_waited_for() -> None:
    async with ProxyStack(items=WAITING) as stack:
        stack.encoders[0].default = fake.after(0.2, fake.refuse(500))
        stack.instances[0].script.append(fake.hang)
        reply = await stack.post(chat(image_part()))
        assert reply.status == 200
        waited, encoded = stack.instances[0].requests
        assert waited.document.pop("vllm_xargs") == PENDING
        assert "vllm_xargs" not in encoded.document
        await stack.until(lambda: stack.instances[0].aborted == 1)


@pytest.mark.parametrize(("fault", "status"), [(fake.refuse(400, "bad picture"), 400), (fake.refuse(500), 503)])
async def test_what_ends_the_request_at_the_encoder_ends_it_everywhere(fault: fake.Behaviour, status: int) -> None:
    async with ProxyStack(items=WAITING, encode_fallback="off") as stack:
        stack.encoders[0].default = fake.after(0.2, fault)
        stack.instances[0].default = fake.hang
        assert (await stack.post(chat(image_part()))).status == status
        await stack.until(lambda: stack.instances[0].aborted == 1)


async def test_an_instance_that_fails_first_ends_the_encoder() -> None:
    async with ProxyStack(items=WAITING) as stack:
        stack.encoders[0].default = fake.hang
        stack.instances[0].default = fake.after(0.2, fake.refuse(400, "no such model"))
        reply = await stack.post(chat(image_part()))
        assert (reply.status, reply.error["message"]) == (400, "no such model")
        await stack.until(lambda: stack.encoders[0].aborted == 1)


@pytest.mark.parametrize("streamed", [False, True])
async def test_who_answers_before_the_encoder_needs_it_no_more(streamed: bool) -> None:
    async with ProxyStack(items=WAITING) as stack:
        stack.encoders[0].default = fake.hang
        assert (await stack.post(chat(image_part(), stream=streamed))).status == 200
        await stack.until(lambda: stack.encoders[0].running == 0)


async def test_a_client_that_leaves_closes_both() -> None:
    async with ProxyStack(items=WAITING) as stack:
        stack.encoders[0].default = stack.instances[0].default = fake.hang
        sending = asyncio.create_task(stack.post(chat(image_part())))
        await stack.until(lambda: stack.encoders[0].running == stack.instances[0].running == 1)
        sending.cancel()
        await stack.until(lambda: stack.encoders[0].aborted == stack.instances[0].aborted == 1)


def sent(**more: Any) -> dict[str, Any]:
    body = json.dumps(chat(image_part(), **more)).encode()
    return json.loads(pending_body(parse_request(CHAT, body, items_max=9, key=ITEM_KEY)))  # type: ignore[no-any-return]


def test_other_arguments_stay_and_only_the_proxy_says_what_is_pending() -> None:
    assert sent()["vllm_xargs"] == sent(vllm_xargs=None)["vllm_xargs"] == PENDING
    assert sent(vllm_xargs={"mine": 2})["vllm_xargs"] == {"mine": 2, **PENDING}
    assert sent(vllm_xargs="nonsense")["vllm_xargs"] == "nonsense"
    given = json.dumps(chat(vllm_xargs={"ec_items_pending": 1, "mine": 2}, ec_items_pending=3)).encode()
    request = parse_request(CHAT, given, items_max=9, key=ITEM_KEY)
    assert json.loads(request.body) == chat(vllm_xargs={"mine": 2})
