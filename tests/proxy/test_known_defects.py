"""The defects of today's example proxies in what is asked and answered, by their numbers, each of which has a test."""

import json
import os
import re
from pathlib import Path

import aiohttp
import pytest

from epd_proxy.config import Timeouts
from fakes import instances as fake
from fakes.proxy_stack import CHAT, COMPLETIONS, MODEL, ProxyStack, chat, image_part, read_to_break, unnamed, url_part


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
