"""Instances that fail: every request ends with a right answer or a clear error, and nothing is left behind."""

import asyncio
import json
import random
import socket

import pytest

from epd_proxy.config import Health, Retry, Timeouts
from epd_proxy.pool import Health as State
from fakes import instances as fake
from fakes.proxy_stack import CHAT, ProxyStack, chat, image_part, read_to_break, unnamed

BEFORE_THE_FIRST_BYTE = [
    fake.drop,
    fake.cut_json,
    fake.empty,
    fake.refuse(500),
    fake.refuse(503),
    fake.refuse(429),
    fake.stream((), end="cut"),
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_BYTE)
async def test_before_the_first_byte_another_instance_is_asked(fault: fake.Behaviour, streamed: bool) -> None:
    async with ProxyStack(encoders=0, instances=2) as stack:
        for instance in stack.instances:
            instance.script.append(fault)
            instance.script.append(fake.answer)
        stack.instances[1].script.popleft()  # whichever is asked first, at most one of the two fails
        for _ in range(2):
            reply = await stack.post(chat(stream=streamed))
            assert reply.status == 200
            assert reply.body
        assert [len(i.requests) for i in stack.instances] in ([1, 2], [2, 1])


@pytest.mark.parametrize(
    ("fault", "status"),
    [(fake.drop, 502), (fake.cut_json, 502), (fake.empty, 502), (fake.refuse(500, "engine"), 500),
     (fake.refuse(500, body=b"<html>"), 502), (fake.refuse(503), 503), (fake.refuse(429), 429),
     (fake.refuse(501), 501), (fake.refuse(302), 502), (fake.stream((), end="cut"), 502), (fake.stream(()), 502)],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
async def test_when_all_fail_the_client_is_told(fault: fake.Behaviour, status: int, streamed: bool) -> None:
    async with ProxyStack(encoders=0, instances=2) as stack:
        for instance in stack.instances:
            instance.default = fault
        reply = await stack.post(chat(stream=streamed))
        assert (reply.status, bool(reply.error["message"])) == (status, True)
        # A kept connection that breaks at once may have been stale: that one is sent again, to the same instance.
        assert max(len(i.requests) for i in stack.instances) <= (2 if fault is fake.drop else 1)


async def test_attempts_are_limited() -> None:
    async with ProxyStack(encoders=0, instances=4, retry=Retry(max_attempts=2)) as stack:
        for instance in stack.instances:
            instance.default = fake.refuse(503)
        assert (await stack.post(chat())).status == 503
        assert sum(len(i.requests) for i in stack.instances) == 2


@pytest.mark.parametrize("status", [429, 503])
async def test_an_instance_says_itself_when_to_come_again(status: int) -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.refuse(status, headers={"Retry-After": "17"})
        reply = await stack.post(chat())
        assert (reply.status, reply.headers.getall("Retry-After")) == (status, ["17"])  # type: ignore[attr-defined]


async def test_a_time_out_is_not_tried_again() -> None:
    async with ProxyStack(encoders=0, instances=2, timeouts=Timeouts(first_byte_s=0.2)) as stack:
        for instance in stack.instances:
            instance.default = fake.hang
        assert (await stack.post(chat())).status == 504
        assert sum(len(i.requests) for i in stack.instances) == 1
        await stack.until(lambda: sum(i.aborted for i in stack.instances) == 1)


async def test_no_instance_is_a_503_at_once_and_a_probe_brings_it_back() -> None:
    async with ProxyStack(encoders=0, health=Health(interval_s=0.05)) as stack:
        instance = stack.instances[0]
        await instance.stop()
        for _ in range(2):
            reply = await stack.post(chat())
            assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
            assert "127.0.0.1" not in reply.error["message"]
        ready = await stack.get("/ready")
        assert (ready.status, ready.document["reasons"]) == (503, ["prefill_decode: 0 of 1 up"])
        assert (await stack.get("/health")).status == 200
        await instance.start()
        await stack.until(lambda: stack.pools["prefill_decode"].ready)
        assert (await stack.post(chat())).status == 200
        assert (await stack.get("/ready")).status == 200


async def test_an_unhealthy_instance_gets_nothing_more() -> None:
    async with ProxyStack(encoders=0, instances=2, health=Health(interval_s=0.05)) as stack:
        stack.instances[0].healthy = False
        await stack.until(lambda: stack.pools["prefill_decode"].endpoints[0].health is State.DOWN)
        for _ in range(4):
            assert (await stack.post(chat())).status == 200
        assert [len(i.requests) for i in stack.instances] == [0, 4]


@pytest.mark.parametrize(
    "fault", [fake.drop, fake.refuse(500), fake.refuse(503), fake.refuse(429), fake.hang, "stopped"]
)
async def test_without_encoder_the_next_stage_encodes(fault: fake.Behaviour | str) -> None:
    async with ProxyStack(timeouts=Timeouts(encode_s=0.3)) as stack:
        if isinstance(fault, str):
            await stack.encoders[0].stop()
        else:
            stack.encoders[0].default = fault
        asked = chat(image_part(), image_part())
        reply = await stack.post(asked)
        assert reply.status == 200
        assert unnamed(stack.instances[0].requests[0].document) == asked
        assert (
            b'epd_proxy_encode_items_total{modality="image",outcome="local"} 2.0' in (await stack.get("/metrics")).body
        )


@pytest.mark.parametrize("fault", [fake.drop, fake.refuse(500), fake.refuse(429)])
async def test_without_encoder_and_fallback_it_is_a_503(fault: fake.Behaviour) -> None:
    async with ProxyStack(encode_fallback="off") as stack:
        stack.encoders[0].default = fault
        reply = await stack.post(chat(image_part(), image_part()))
        assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert stack.instances[0].requests == []
        assert (await stack.post(chat())).status == 200


async def test_a_second_encoder_takes_over() -> None:
    async with ProxyStack(encoders=2, encode_fallback="off") as stack:
        stack.encoders[0].default = fake.drop
        assert (await stack.post(chat(image_part()))).status == 200
        assert (await stack.post(chat(image_part()))).status == 200
        assert len(stack.encoders[1].requests) == 2


async def test_one_refused_item_ends_the_others() -> None:
    async with ProxyStack(encoders=2) as stack:
        stack.encoders[0].default = fake.hang
        stack.encoders[1].default = fake.refuse(400, "bad picture")
        reply = await stack.post(chat(image_part(), image_part()))
        assert (reply.status, reply.error["message"]) == (400, "bad picture")
        await stack.until(lambda: stack.encoders[0].aborted == 1)


async def test_a_stream_that_ends_too_early_is_told() -> None:
    """In good order for HTTP, but without the last event."""
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream(fake.TEXT[:2])
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            body, broken = await read_to_break(response)
        assert broken
        assert json.loads(body.rpartition(b"event: error\ndata: ")[2])["error"]["code"] == 502
        assert b"epd_proxy_broken_streams_total 1.0" in (await stack.get("/metrics")).body


@pytest.mark.parametrize("end", ["cut", "joined"])
async def test_an_event_cut_in_the_midst_is_ended_before_the_error(end: str) -> None:
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream((fake.TEXT[0], fake.TEXT[1][:20]), 0.01, end=end)
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            body, broken = await read_to_break(response)
        assert broken
        assert body.startswith(fake.TEXT[0] + fake.TEXT[1][:20] + b"\n\nevent: error\ndata: {")


async def test_nothing_follows_the_end_of_a_stream_that_the_client_is_slow_to_take() -> None:
    """The proxy stops when all is written, and most of it not taken yet: it still goes out, and is a whole answer."""
    long = b"data: " + b"x" * 120_000 + b"\n\n" + fake.DONE
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream((fake.TEXT[0], long), 0.2, end="joined")
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, stack.app.listener.addresses[0])
            body = json.dumps(chat(stream=True)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            await loop.sock_sendall(client, head + body)
            await asyncio.sleep(0.5)
            assert stack.handlers.admission.running == 1
            await stack.handlers.drain(0.1)
            got = b""
            while piece := await loop.sock_recv(client, 65_536):
                got += piece
        assert got.endswith(b"x\n\n" + fake.DONE + b"\r\n0\r\n\r\n")


async def test_a_kept_connection_that_the_instance_closed_costs_nothing() -> None:
    """The instance restarts between two requests: the proxy holds a connection that is dead."""
    async with ProxyStack(encoders=0) as stack:
        for _ in range(5):
            assert (await stack.post(chat())).status == 200
            await stack.instances[0].stop()
            await stack.instances[0].start()
        assert len(stack.instances[0].requests) == 5


async def test_a_slow_reader_holds_the_instance_back() -> None:
    async with ProxyStack(encoders=0) as stack:
        written = 0

        async def flood(_fake: object, request: fake.web.Request, _recorded: object) -> fake.web.StreamResponse:
            nonlocal written
            response = fake.web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for _ in range(3000):
                await response.write(b"data: " + b"x" * 65_536 + b"\n\n")
                written += 65_536
            await response.write(fake.DONE)
            return response

        stack.instances[0].default = flood
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            await asyncio.sleep(0.5)
            assert written < 30_000_000, "the proxy swallowed what nobody reads"
            assert (await response.read()).endswith(fake.DONE)


async def test_nothing_is_left_after_many_mixed_requests() -> None:
    """Clients that leave, instances that fail, all at once; leaving the stack asserts that all is given back."""
    chance = random.Random(7)
    faults = [*BEFORE_THE_FIRST_BYTE, fake.refuse(400), fake.stream(fake.TEXT[:1], end="cut"), fake.after(0.05)]
    async with ProxyStack(encoders=2, instances=3) as stack:

        async def misbehave(instance: fake.FakeInstance, request: fake.web.Request, recorded: fake.Recorded) -> object:
            behave = chance.choice(faults) if chance.random() < 0.2 else fake.answer
            return await behave(instance, request, recorded)

        for instance in (*stack.encoders, *stack.instances):
            instance.default = misbehave  # type: ignore[assignment]

        async def send() -> None:
            parts = [image_part()] * chance.randrange(3)
            try:
                async with asyncio.timeout(chance.choice((0.005, 5))):
                    async with stack.client.post(CHAT, json=chat(*parts, stream=chance.random() < 0.5)) as response:
                        body, broken = await read_to_break(response)
                        assert body
                        assert broken == (b"event: error" in body)
                        assert response.status != 500 or b"no" in body
            except TimeoutError:
                pass

        for _ in range(10):
            await asyncio.gather(*(send() for _ in range(40)))
            for pool in stack.pools.values():
                for endpoint in pool.endpoints:
                    endpoint.mark_probe(None)
        for instance in (*stack.encoders, *stack.instances):
            await stack.until(lambda instance=instance: instance.running == 0)
        await stack.until_idle()
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("encode ")]


@pytest.mark.parametrize(("pieces", "end"), [(fake.TEXT, "whole"), (fake.TEXT[:2], "cut")])
async def test_the_access_line_counts_what_a_stream_sent(
    pieces: tuple[bytes, ...], end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All that the client got, the event that tells of a failure with it."""
    caplog.set_level("INFO", "epd_proxy.access")
    async with ProxyStack() as stack:
        stack.instances[0].default = fake.stream(pieces, 0.01, end=end)
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            body, broken = await read_to_break(response)
    assert broken is (end == "cut") is (body != b"".join(pieces))
    [line] = [record.fields for record in caplog.records if record.name == "epd_proxy.access"]  # type: ignore[attr-defined]
    assert line["bytes_out"] == len(body)


async def test_the_access_line_counts_what_a_client_got_that_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "epd_proxy.access")
    async with ProxyStack() as stack:
        stack.instances[0].default = fake.stream(fake.TEXT[:1], end="hang")
        async with stack.client.post(CHAT, json=chat(stream=True)) as response:
            assert await response.content.readany() == fake.TEXT[0]
    [line] = [record.fields for record in caplog.records if record.name == "epd_proxy.access"]  # type: ignore[attr-defined]
    assert line["bytes_out"] == len(fake.TEXT[0])
