"""What a client gets wrong is answered with a 4xx in OpenAI's form, and the next request is served."""

import asyncio
import json
import logging

import pytest

from epd_proxy.config import MIB, Limits
from fakes import instances as fake
from fakes.instances import FakeInstance
from fakes.proxy_process import ProxyProcess
from fakes.proxy_stack import CHAT, COMPLETIONS, MODEL, ProxyStack, chat, data_url, image_part, url_part

UNREACHABLE = "Cannot connect to host nowhere.test:80 ssl:default [Name or service not known]"


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (url_part("data:image/png;base64,@@@@"), "messages[0].content[0].image_url.url"),
        (url_part("data:image/png;base64,QUJ"), "base64"),
        (url_part("data:image/png;base64,"), "nothing after"),
        (url_part("data:image/png,abc"), "data:<media type>;base64,<content>"),
        (url_part("data:image/png;charset=utf-8;base64,QUJD"), "data:<media type>;base64,<content>"),
        (url_part("data:"), "data:<media type>;base64,<content>"),
        (url_part("file:///etc/passwd"), "http://, https:// or data:"),
        (url_part("gopher://host/x"), "http://, https:// or data:"),
        (url_part("/etc/passwd", "video_url"), "video_url"),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, "http://, https:// or data:"),
        ({"uuid": "a", "audio_url": "file:///etc/passwd"}, "audio_url"),
        ({"type": "input_image", "image_url": "file:///etc/passwd"}, "image_url"),
    ],
)
async def test_bad_media_is_a_400_that_says_where(part: dict[str, object], names: str) -> None:
    async with ProxyStack() as stack:
        reply = await stack.post(chat(image_part()) | {"messages": [{"role": "user", "content": [part]}]})
        assert reply.status == 400
        assert names in reply.error["message"]
        assert stack.encoders[0].requests == stack.instances[0].requests == []
        assert (await stack.post(chat(image_part()))).status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b'{"a": NaN}', b"\xff\xfe{}", b'{"a":"\\ud800"}',
                                  b"[" * 100_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000])  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_no_json_object_is_a_400(body: bytes, path: str) -> None:
    async with ProxyStack(encoders=0) as stack:
        reply = await stack.post(body, path)
        assert (reply.status, reply.error["type"]) == (400, "BadRequestError")
        assert stack.instances[0].requests == []


@pytest.mark.parametrize(
    "messages",
    [None, 1, "x", {}, [], [1, None, "x"], [{"content": 5}], [{"content": [None, 1, [], "text", {}]}],
     [{"content": [{"type": 7}, {"type": "image_url"}, {"type": "image_url", "image_url": 3},
                   {"type": "image_url", "image_url": {"url": ["x"]}}, {"type": "input_audio", "input_audio": "x"}]}]],
)  # fmt: skip
async def test_what_only_the_instance_can_judge_is_left_to_it(messages: object) -> None:
    async with ProxyStack() as stack:
        stack.instances[0].default = fake.refuse(400, "messages: bad")
        reply = await stack.post({"model": MODEL, "messages": messages, "max_tokens": "many", "n": -1})
        assert (reply.status, reply.error["message"]) == (400, "messages: bad")
        assert stack.encoders[0].requests == []


async def test_a_text_file_as_picture_gets_the_encoders_400() -> None:
    async with ProxyStack() as stack:
        stack.encoders[0].default = fake.needs_picture
        reply = await stack.post(chat(image_part(), url_part(data_url(b"just text, really", "text/plain"))))
        assert reply.status == 400
        assert "Failed to load image" in reply.error["message"]
        assert stack.instances[0].requests == []
        assert (await stack.post(chat(image_part()))).status == 200


async def test_an_encoders_refusal_without_openai_form_gets_it() -> None:
    async with ProxyStack() as stack:
        stack.encoders[0].default = fake.refuse(422, body=b"what?")
        reply = await stack.post(chat(image_part()))
        assert reply.status == 422
        assert "encode" in reply.error["message"]


@pytest.mark.parametrize("message", [UNREACHABLE, "404, message='Not Found', url='http://nowhere.test/'", ""])
@pytest.mark.parametrize("encoders", [0, 2])
async def test_an_unreachable_media_url_is_a_400_although_vllm_says_500(
    message: str, encoders: int, caplog: pytest.LogCaptureFixture
) -> None:
    """And only the log says why: a client could find out with it what listens in the instance's network."""
    caplog.set_level(logging.INFO, "epd_proxy.access")
    async with ProxyStack(encoders=encoders) as stack:
        for instance in (*stack.encoders, *stack.instances):
            instance.default = fake.refuse(500, message, "InternalServerError")
        reply = await stack.post(chat(url_part("http://nowhere.test/cat.png")))
        assert reply.status == 400
        told = "a media URL of the request could not be fetched by the model server"
        assert reply.error["message"] == told
        [line] = [r.fields for r in caplog.records if hasattr(r, "fields")]
        assert line["error"] == f"{told}: {message or 'it did not answer in time'}"
        assert sum(len(f.requests) for f in (*stack.encoders, *stack.instances)) == 1


async def test_an_instances_own_500_is_not_the_clients_fault() -> None:
    async with ProxyStack() as stack:
        stack.encoders[0].default = fake.refuse(500, "EngineCore encountered an issue.", "InternalServerError")
        assert (
            await stack.post(chat(url_part("http://a.test/cat.png")))
        ).status == 200  # encoded where it is prefilled
        stack.instances[0].default = fake.refuse(500, UNREACHABLE, "InternalServerError")
        assert (await stack.post(chat(image_part()))).status == 500  # nothing was to be fetched


@pytest.mark.parametrize("parts", [[], [image_part()]])
async def test_an_unknown_model_is_the_instances_404(parts: list[dict[str, object]]) -> None:
    async with ProxyStack() as stack:
        unknown = fake.refuse(404, "The model `x` does not exist.", "NotFoundError")
        stack.encoders[0].default = stack.instances[0].default = unknown
        reply = await stack.post(chat(*parts, model="x"))
        assert (reply.status, reply.error["type"]) == (404, "NotFoundError")


async def test_an_error_that_is_no_json_comes_through_as_it_is() -> None:
    async with ProxyStack() as stack:
        stack.instances[0].default = fake.refuse(415, body=b"only application/json")
        reply = await stack.post(chat())
        assert (reply.status, reply.body) == (415, b"only application/json")
        assert reply.headers["Content-Type"].startswith("text/plain")
        stack.instances[0].default = fake.refuse(418, body=b"")
        assert (await stack.post(chat())).error["message"]


async def test_too_many_items() -> None:
    async with ProxyStack(limits=Limits(media_items=3)) as stack:
        assert (await stack.post(chat(*[image_part()] * 3))).status == 200
        reply = await stack.post(chat(*[image_part()] * 4))
        assert reply.status == 400
        assert "at most 3" in reply.error["message"]


async def test_parts_without_content_to_encode_skip_the_encoder() -> None:
    async with ProxyStack() as stack:
        cached = {"type": "image_url", "image_url": None, "uuid": "known"}
        ready = {"type": "image_embeds", "image_embeds": "QUJD"}
        assert (await stack.post(chat(cached, ready))).status == 200
        assert stack.encoders[0].requests == []


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/metaserver", "/nothing"])
async def test_other_paths_are_a_404(path: str) -> None:
    async with ProxyStack() as stack:
        assert (await stack.get(path)).error["type"] == "NotFoundError"
        assert (await stack.post(b"{}", path)).status == 404
        assert stack.instances[0].requests == []


async def test_the_wrong_method_is_a_405() -> None:
    async with ProxyStack() as stack:
        reply = await stack.get(CHAT)
        assert (reply.status, reply.headers["Allow"]) == (405, "POST")
        assert "POST" in reply.error["message"]


async def test_what_no_handler_saw_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "epd_proxy.access")
    async with ProxyStack(encoders=0, limits=Limits(body_bytes=MIB)) as stack:
        await stack.get("/nothing")
        await stack.get(CHAT)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {2 * MIB}"
        await send_raw(int(stack.url.rpartition(":")[2]), head, 0, b"")
        lines = [(r.fields["path"], r.fields["status"]) for r in caplog.records if hasattr(r, "fields")]
        assert lines == [("/nothing", 404), (CHAT, 405), (CHAT, 413)]
        counted = (await stack.get("/metrics")).body.decode()
        for path, status in (("other", 404), ("/v1/{rest}", 405), (CHAT, 413)):
            assert f'epd_proxy_requests_total{{path="{path}",status="{status}"}} 1.0' in counted


async def send_raw(port: int, head: str, pieces: int, piece: bytes) -> tuple[bytes, int]:
    """Send a request as a plain client does; return the answer and how many pieces it could write."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + b"\r\n\r\n")
    sent = 0
    try:
        for _ in range(pieces):
            writer.write(piece)
            await writer.drain()
            sent += 1
    except ConnectionError:
        pass
    answer = await reader.read(65_536)
    writer.close()
    return answer, sent


def peak_mib(pid: int) -> float:
    """Peak resident memory of a process."""
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("announced", [True, False])
async def test_300_mb_are_refused_and_never_held(announced: bool) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    async with FakeInstance() as instance, ProxyProcess("--prefill-decode", instance.url) as proxy:
        before_mib = peak_mib(proxy.process.pid)
        if announced:
            answer, _ = await send_raw(proxy.port, head + f"Content-Length: {300 * 10**6}", 300, b"x" * 10**6)
            assert peak_mib(proxy.process.pid) - before_mib < 32
        else:
            piece = b"%x\r\n" % 10**6 + b"x" * 10**6 + b"\r\n"
            answer, _ = await send_raw(proxy.port, head + "Transfer-Encoding: chunked", 300, piece)
            assert peak_mib(proxy.process.pid) - before_mib < 2.5 * 128
        top, _, body = answer.partition(b"\r\n\r\n")
        assert top.startswith(b"HTTP/1.1 413 ")
        assert json.loads(body)["error"]["code"] == 413
        async with proxy.client.post(CHAT, json=chat()) as response:
            assert response.status == 200
        assert len(instance.requests) == 1


async def test_expect_100_is_told_413_before_the_body() -> None:
    async with ProxyStack(limits=Limits(body_bytes=MIB)) as stack:
        port = int(stack.url.rpartition(":")[2])
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: "
        answer, _ = await send_raw(port, head + str(2 * MIB), 0, b"")
        assert answer.startswith(b"HTTP/1.1 413 ")
        body = json.dumps(chat()).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}{len(body)}\r\n\r\n".encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()
