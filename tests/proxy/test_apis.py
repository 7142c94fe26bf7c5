"""The APIs beside chat and completions: which go through the stages, which are passed on, and how."""

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web

from epd_proxy.config import Retry
from fakes import instances as fake
from fakes.instances import MODEL, Behaviour, FakeInstance, Recorded
from fakes.proxy_stack import CHAT, ProxyStack, chat, data_url, image_part, picture, read_to_break

MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"


def source(content: bytes | None = None, **more: Any) -> dict[str, Any]:
    """A picture as Anthropic's clients send it."""
    data = data_url(content or picture()).partition(",")[2]
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data, **more}}


def message(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = [*blocks, {"type": "text", "text": "What is it?"}]
    return {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": content}], **more}


def response(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "input_text", "text": "What is it?"}]
    return {"model": MODEL, "max_output_tokens": 8, "input": [{"role": "user", "content": content}], **more}


def input_image(content: bytes | None = None) -> dict[str, Any]:
    return {"type": "input_image", "detail": "auto", "image_url": data_url(content or picture())}


def sends(document: dict[str, Any], status: int = 200) -> Behaviour:
    """Answer with ``document``."""

    async def behave(_instance: FakeInstance, _request: web.Request, _recorded: Recorded) -> web.StreamResponse:
        return web.json_response(document, status=status)

    return behave


# Anthropic's messages.
async def test_pictures_of_a_message_are_encoded_as_a_chat_and_the_message_goes_on_as_it_came() -> None:
    async with ProxyStack() as stack:
        blue, green = picture(color="blue"), picture(color="green")
        asked = message(source(), source(blue), source(type="url", url="https://a.test/x.png", data=None))
        asked["messages"][0]["content"].append(
            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "see"}, source(green)]}
        )
        asked["messages"].append({"role": "system", "content": [source(picture(color="black"))]})  # vLLM leaves it out
        asked["mm_processor_kwargs"] = {"max_pixels": 1}  # vLLM leaves it out too
        body = json.dumps(asked).encode()
        assert (await stack.post(body, MESSAGES)).status == 200
        encodes = stack.encoders[0].requests
        assert {request.path for request in encodes} == {CHAT}
        urls = sorted(request.parts[0]["image_url"]["url"] for request in encodes)
        assert urls == sorted([data_url(picture()), data_url(blue), data_url(green), "https://a.test/x.png"])
        assert all(set(r.parts[0]) == {"type", "image_url"} for r in encodes)
        assert all("mm_processor_kwargs" not in r.document and r.document["max_tokens"] == 1 for r in encodes)
        [sent] = stack.instances[0].requests
        assert (sent.path, sent.body) == (MESSAGES, body)


async def test_a_messages_stream_has_its_own_end_and_its_own_errors() -> None:
    end = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    begin = b'event: message_start\ndata: {"type":"message_start","message":{}}\n\n'
    async with ProxyStack(encoders=0) as stack:
        stack.instances[0].default = fake.stream([begin, end])
        assert (await stack.post(message(stream=True), MESSAGES)).body == begin + end
        for how, pieces in (("cut", [begin]), ("whole", [begin])):  # the second closes in good order, too early
            stack.instances[0].default = fake.stream(pieces, 0.01, end=how)
            async with stack.client.post(MESSAGES, json=message(stream=True)) as answer:
                body, broken = await read_to_break(answer)
            assert broken
            event = json.loads(body.removeprefix(begin).removeprefix(b"event: error\ndata: "))
            assert (event["type"], event["error"]["type"]) == ("error", "BadGateway")


async def test_errors_are_of_the_form_that_the_clients_of_a_path_read() -> None:
    async with ProxyStack() as stack:
        reply = await stack.post(message(source(data="@@@@")), MESSAGES)
        assert (reply.status, reply.document["type"]) == (400, "error")
        assert "messages[0].content[0]" in reply.document["error"]["message"]
        stack.encoders[0].default = fake.needs_picture
        reply = await stack.post(message(source(data="QUJD")), MESSAGES)
        assert (reply.status, reply.document["type"]) == (400, "error")
        stack.instances[0].default = sends({"type": "error", "error": {"type": "x", "message": "no such model"}}, 404)
        reply = await stack.post(message(), MESSAGES)
        assert reply.document == {"type": "error", "error": {"type": "x", "message": "no such model"}}
        assert "type" not in (await stack.post(chat(image_part(b"text")))).document


async def test_anthropics_client_works_unchanged() -> None:
    whole = {"id": "m", "type": "message", "role": "assistant", "model": MODEL, "stop_reason": "end_turn",
             "content": [{"type": "text", "text": "A cup"}],
             "usage": {"input_tokens": 9, "output_tokens": 2, "cache_read_input_tokens": 4}}  # fmt: skip
    async with (
        ProxyStack() as stack,
        anthropic.AsyncAnthropic(base_url=stack.url, api_key="k", max_retries=0) as client,
    ):
        stack.instances[0].default = sends(whole)
        asked = message(source())
        answer = await client.messages.create(model=MODEL, max_tokens=8, messages=asked["messages"])
        assert (answer.content[0].text, answer.usage.cache_read_input_tokens) == ("A cup", 4)  # type: ignore[union-attr]
        stack.instances[0].default = sends({"input_tokens": 5})
        counted = await client.messages.count_tokens(model=MODEL, messages=asked["messages"])
        assert counted.input_tokens == 5
        assert [len(stack.encoders[0].requests), len(stack.instances[0].requests)] == [1, 2]  # counting encodes nothing
        with pytest.raises(anthropic.BadRequestError, match="base64"):
            await client.messages.create(model=MODEL, max_tokens=8, messages=message(source(data="@"))["messages"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_message_is_split_between_prefill_and_decode(stream: bool) -> None:
    end = [b'event: message_stop\ndata: {"type":"message_stop"}\n\n']
    async with ProxyStack(prefills=1, decodes=1) as stack:
        from fakes.layerwise import waits_for_kv

        stack.decodes[0].default = waits_for_kv(stack.link, fake.stream(end) if stream else fake.answer)
        config = {"effort": "low", "format": {"type": "json_schema", "schema": {}}}
        tools = [{"name": "t", "input_schema": {}}]
        asked = message(source(), stream=stream, output_config=config, tools=tools, tool_choice={"type": "any"})
        assert (await stack.post(asked, MESSAGES)).status == 200
        [decode], [prefill] = stack.decodes[0].requests, stack.prefills[0].requests
        assert decode.path == prefill.path == MESSAGES
        assert {k: v for k, v in decode.document.items() if k != "kv_transfer_params"} == asked
        sent = prefill.document
        assert (sent["stream"], sent["max_tokens"], sent["tool_choice"], sent["tools"]) == (False, 1, None, tools)
        assert sent["output_config"] == {"effort": "low"}
        assert len(stack.encoders[0].requests) == 1


async def test_an_abandoned_message_is_released_as_a_chat() -> None:
    async with ProxyStack(encoders=0, prefills=1, decodes=1) as stack:
        stack.prefills[0].default = fake.after(1.0, stack.prefills[0].default)
        sending = asyncio.create_task(stack.post(message(), MESSAGES))
        await stack.until(lambda: stack.prefills[0].running == 1)
        sending.cancel()
        await stack.until(lambda: len(stack.link.released) == 1)
        assert stack.prefills[0].requests[-1].path == CHAT  # the same internal id, chatcmpl-…, in vLLM 0.23


# OpenAI's responses.
async def test_pictures_of_a_response_are_encoded_as_a_chat() -> None:
    async with ProxyStack() as stack:
        asked = response(input_image(), mm_processor_kwargs={"max_pixels": 50_176})
        output = [input_image(picture(color="blue")), {"type": "input_text", "text": "from a tool"}]
        asked["input"].append({"type": "function_call_output", "call_id": "c", "output": output})
        body = json.dumps(asked).encode()
        assert (await stack.post(body, RESPONSES)).status == 200
        encodes = stack.encoders[0].requests
        assert {request.path for request in encodes} == {CHAT}
        urls = sorted(r.parts[0]["image_url"]["url"] for r in encodes)
        assert urls == sorted([data_url(picture()), data_url(picture(color="blue"))])
        assert all(r.document["mm_processor_kwargs"] == {"max_pixels": 50_176} for r in encodes)
        assert stack.instances[0].requests[0].body == body
        reply = await stack.post(response({"type": "input_image", "image_url": "file:///etc/passwd"}), RESPONSES)
        assert (reply.status, "input[0].content[0]" in reply.error["message"]) == (400, True)
        assert (await stack.post({"model": MODEL, "input": "Just text"}, RESPONSES)).status == 200


async def test_a_response_runs_whole_on_a_prefill_instance() -> None:
    async with ProxyStack(prefills=1, decodes=1) as stack:
        assert (await stack.post(response(input_image()), RESPONSES)).status == 200
        assert [len(f.requests) for f in (*stack.encoders, *stack.prefills, *stack.decodes)] == [1, 1, 0]


async def test_what_one_instance_has_stored_is_found() -> None:
    async with ProxyStack(encoders=0, instances=5, retry=Retry(max_attempts=1)) as stack:
        for instance in stack.instances:
            instance.default = fake.refuse(404, "no such response", "NotFoundError")
        owner = stack.instances[3]
        owner.default = sends({"id": "resp_1"})
        async with stack.client.get(f"{RESPONSES}/resp_1?stream=false") as reply:
            assert (reply.status, await reply.json()) == (200, {"id": "resp_1"})
        assert (await stack.post(b"", f"{RESPONSES}/resp_1/cancel")).status == 200
        assert (await stack.post(response(previous_response_id="resp_1"), RESPONSES)).status == 200
        assert len(owner.requests) == 3
        owner.default = fake.refuse(404, "no such response", "NotFoundError")
        reply = await stack.post(response(previous_response_id="resp_1"), RESPONSES)
        assert (reply.status, reply.error["message"]) == (404, "no such response")
        before = sum(len(i.requests) for i in stack.instances)
        assert (await stack.post(response(), RESPONSES)).status == 404  # the model's, perhaps: one instance's word
        assert sum(len(i.requests) for i in stack.instances) == before + 1


async def test_openais_client_gets_responses() -> None:
    document = {"id": "r", "object": "response", "created_at": 1, "model": MODEL, "status": "completed",
                "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
                "output": [{"type": "message", "id": "m", "role": "assistant", "status": "completed",
                            "content": [{"type": "output_text", "text": "A cup", "annotations": []}]}]}  # fmt: skip
    async with ProxyStack() as stack, openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="k") as client:
        stack.instances[0].default = sends(document)
        answer = await client.responses.create(model=MODEL, input=response(input_image())["input"])
        assert answer.output_text == "A cup"
        assert len(stack.encoders[0].requests) == 1


# What needs no stage.
@pytest.mark.parametrize(
    ("method", "path", "body", "kind"),
    [
        ("POST", "/v1/embeddings", b'{"model": "m", "input":["a"],  "x": 1e2}', "application/json"),
        ("POST", "/tokenize", b'{"prompt": "a"}', "application/json"),
        ("POST", "/detokenize", b'{"tokens": [1]}', "application/json; charset=utf-8"),
        ("POST", "/v1/audio/transcriptions", b"--x\r\n\xff\xfe\r\n--x--", "multipart/form-data; boundary=x"),
        ("POST", "/v1/chat/completions/batch?a=%2Fb&c", b"{}", "application/json"),
        ("GET", "/v1/something/new?x=1", b"", ""),
        ("DELETE", "/v1/files/a%20b", b"", ""),
    ],
)
async def test_the_rest_is_passed_on_untouched(method: str, path: str, body: bytes, kind: str) -> None:
    async with ProxyStack() as stack:
        stack.instances[0].default = sends({"usage": {"prompt_tokens": 3}})
        headers = {"X-Request-Id": "r-1", **({"Content-Type": kind} if kind else {})}
        from yarl import URL

        url = URL(stack.url + path, encoded=True)
        async with stack.client.request(method, url, data=body or None, headers=headers) as reply:
            assert (reply.status, await reply.json()) == (200, {"usage": {"prompt_tokens": 3}})
            assert reply.headers["X-Request-Id"] == "r-1"
        [sent] = stack.instances[0].requests
        assert (sent.path, sent.body, sent.raw_path) == (path.partition("?")[0].replace("%20", " "), body, path)
        assert (sent.method, sent.headers.get("X-Request-Id")) == (method, "r-1")
        assert stack.encoders[0].requests == []


async def test_a_head_is_asked_for_as_the_whole() -> None:
    """An instance's answer to HEAD announces a body that does not come; the proxy's own does so to its client."""
    async with ProxyStack() as stack:
        stack.instances[0].default = sends({"id": "x"})
        async with stack.client.head("/v1/something/new") as reply:
            assert (reply.status, reply.headers["Content-Length"]) == (200, "11")
        assert [request.method for request in stack.instances[0].requests] == ["GET"]
        assert (await stack.get("/health")).status == 200


async def test_usage_and_cached_tokens_pass_unharmed() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    document = {"id": "x", "choices": [], "usage": usage}
    event = b"data: " + json.dumps(document).encode() + b"\n\n" + fake.DONE
    for stack in (ProxyStack(), ProxyStack(prefills=1, decodes=1)):
        async with stack:
            for path in (CHAT, "/v1/completions", "/v1/embeddings", MESSAGES, RESPONSES):
                for instance in (*stack.instances, *stack.prefills):
                    if not stack.decodes:
                        instance.default = sends(document)
                if stack.decodes:
                    from fakes.layerwise import pushes_kv, waits_for_kv

                    stack.decodes[0].default = waits_for_kv(stack.link, sends(document))
                    # Where prefill answers in decode's place the count is its own.
                    stack.prefills[0].default = pushes_kv(stack.link, then=sends(document))
                asked = {**message(), "prompt": "x", "input": "x"}
                assert (await stack.post(asked, path)).document["usage"] == usage
            if stack.instances:
                stack.instances[0].default = fake.stream([event])
                assert (await stack.post(chat(stream=True))).body == event


async def test_prefill_instances_run_models_and_decode_instances_count_tokens() -> None:
    async with ProxyStack(encoders=0, prefills=1, decodes=1) as stack:
        for path in ("/v1/embeddings", "/v1/chat/completions/batch", "/tokenize", "/v1/stored"):
            method = "GET" if path == "/v1/stored" else "POST"
            async with stack.client.request(method, path, json={} if method == "POST" else None) as reply:
                assert reply.status == 200
        assert [r.path for r in stack.prefills[0].requests] == ["/v1/embeddings", "/v1/chat/completions/batch"]
        assert [r.path for r in stack.decodes[0].requests] == ["/tokenize", "/v1/stored"]


async def test_nothing_that_only_the_stages_may_say_is_passed_on() -> None:
    async with ProxyStack() as stack:
        bad = {"kv_transfer_params": {"metaserver": "http://attacker.test/"}, "ec_transfer_params": {}, "input": "x"}
        for path in ("/v1/embeddings", "/v1/chat/completions/batch", RESPONSES, MESSAGES):
            escaped = json.dumps({**message(), **bad}).replace("kv_transfer", "kv\\u005ftransfer").encode()
            assert (await stack.post(escaped, path)).status == 200
            sent = stack.instances[0].requests[-1]
            assert b"transfer" not in sent.body
            assert sent.document["input"] == "x"
        for body in (b'{"a": NaN, "kv_transfer_params": {}}', b"[]", b"{"):
            assert (await stack.post(body, "/v1/embeddings")).status == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("GET", MESSAGES, 405),
        ("PUT", "/v1/embeddings", 405),
        ("POST", "/v1/load_lora_adapter", 501),
        ("POST", "/v1/unload_lora_adapter", 501),
        ("POST", "/v1/metaserver/x", 404),
        ("POST", "/v1/../start_profile", 404),
        ("POST", "/v1/%2e%2e/start_profile", 404),
        ("POST", "/v1/a/../../start_profile", 404),
        ("POST", "/v1//x", 404),
        ("POST", "/v1/", 404),
        ("POST", "/start_profile", 404),
        ("POST", "/sleep", 404),
        ("GET", "/tokenize", 405),
    ],
)
async def test_what_is_not_passed_on(method: str, path: str, status: int) -> None:
    async with ProxyStack(encoders=0) as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
        writer.write((head + "Connection: close\r\n\r\n{}").encode())
        answer = await reader.read()
        writer.close()
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == status
        assert stack.instances[0].requests == []


async def test_a_websocket_is_told_that_there_is_none() -> None:
    async with ProxyStack() as stack:
        headers = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        async with stack.client.get("/v1/realtime", headers=headers) as reply:
            assert reply.status == 501


async def test_the_models_of_all_instances_are_merged() -> None:
    async with ProxyStack(encoders=0, instances=3) as stack:
        stack.instances[0].models = [MODEL, "adapter-a"]
        stack.instances[1].models = [MODEL, "adapter-b"]
        models = (await stack.get("/v1/models")).document
        assert models["object"] == "list"
        assert sorted(model["id"] for model in models["data"]) == ["adapter-a", "adapter-b", MODEL]
        await stack.instances[1].stop()
        assert {m["id"] for m in (await stack.get("/v1/models")).document["data"]} == {MODEL, "adapter-a"}
        for instance in stack.instances:
            await instance.stop()
        reply = await stack.get("/v1/models")
        assert (reply.status, reply.error["type"]) == (503, "ServiceUnavailable")


async def test_a_key_that_the_instances_refuse_is_told_for_models_too() -> None:
    async with ProxyStack(encoders=0, instances=2) as stack:
        for instance in stack.instances:
            instance.models_status = 401
        assert (await stack.get("/v1/models")).status == 401


async def test_an_item_is_known_for_those_apis_that_name_it_alike() -> None:
    """A chat's picture is stored under the name that the proxy gave it; the others' under what vLLM makes of it."""
    async with ProxyStack() as stack:
        for path, asked in (
            (CHAT, chat(image_part())),
            (MESSAGES, message(source())),
            (RESPONSES, response(input_image())),
        ):
            for _ in range(2):
                assert (await stack.post(asked, path)).status == 200
        parts = [request.parts[0] for request in stack.encoders[0].requests]
        assert len(parts) == 3
        assert ["uuid" in part for part in parts] == [True, False, False]
