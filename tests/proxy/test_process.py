"""The console script: flags, variables, refusals, logs, draining."""

import json
import subprocess
import sys
import time

import openai
import pytest

from fakes import instances as fake
from fakes.instances import MODEL, FakeInstance
from fakes.layerwise import KvLink, decode_instance, prefill_instance
from fakes.proxy_process import ProxyProcess, free_port
from fakes.proxy_stack import CHAT, ProxyStack, chat, data_url, image_part, picture, read_to_break


def refused(*arguments: str) -> str:
    """Run the script; return what it says when it refuses to start."""
    command = [sys.executable, "-m", "epd_proxy", *arguments]
    environ = {"PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20, env=environ)
    assert ended.returncode == 2, ended
    return ended.stderr


def test_all_faults_are_told_at_once() -> None:
    told = refused("--encode", "nonsense", "--port", "many", "--max-retries", "0")
    assert "4 faults" in told
    for name in ("--encode", "--port", "--max-retries", "--prefill-decode"):
        assert f"- {name}" in told or name in told


def test_an_address_that_decode_cannot_reach_is_refused() -> None:
    told = refused(
        "--prefill", "http://p:1", "--decode", "http://d:1", "--metaserver-advertise-url", "http://localhost:1"
    )
    assert "- --metaserver-advertise-url: http://localhost:1 leads http://d:1 to itself" in told


async def test_the_split_stages_as_a_process() -> None:
    link = KvLink()
    async with prefill_instance(link, "p") as prefill, decode_instance(link, "d") as decode:
        port = str(free_port())
        arguments = ("--prefill", prefill.url, "--decode", decode.url, "--metaserver-host", "127.0.0.1",
                     "--metaserver-port", port)  # fmt: skip
        async with ProxyProcess(*arguments) as proxy:
            for stream in (False, True):
                async with proxy.client.post(CHAT, json=chat(stream=stream)) as response:
                    assert response.status == 200
                    assert await response.read()
            async with proxy.client.post(f"http://127.0.0.1:{port}/v1/metaserver/x") as response:
                assert response.status == 404
            async with proxy.client.post("/v1/metaserver/x") as response:
                assert response.status == 404  # nothing of it at the clients' port
            proxy.terminate()
            code, err = await proxy.end()
        assert (code, "Traceback" in err, len(link.prefilled), link.harm) == (0, False, 2, [])


async def test_a_start_that_fails_shows_what_the_proxy_said() -> None:
    with pytest.raises(AssertionError, match="expected http://host:port, found 'nonsense'"):
        async with ProxyProcess("--prefill-decode", "nonsense"):
            pass


def test_a_taken_port_is_told() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [
            sys.executable,
            "-m",
            "epd_proxy",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--prefill-decode",
            "http://a:1",
        ]
        ended = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=20, env={"PYTHONPATH": ":".join(sys.path)}
        )
    assert ended.returncode == 1
    assert port in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_the_names_of_the_example_proxy_work() -> None:
    async with FakeInstance() as encoder, FakeInstance() as instance:
        arguments = ("--encoder-hosts", "127.0.0.1", "--encoder-ports", str(encoder.port), "--pd-hosts", "127.0.0.1",
                     "--pd-ports", str(instance.port), "--max-retries", "2", "--retry-delay", "0.01")  # fmt: skip
        async with ProxyProcess(*arguments) as proxy:
            async with proxy.client.post(CHAT, json=chat(image_part())) as response:
                assert response.status == 200
            async with proxy.client.get("/healthcheck") as response:
                counts = await response.json()
        assert (counts["encode_instances"], counts["pd_instances"], counts["decode_instances"]) == (1, 1, 0)
        assert (len(encoder.requests), len(instance.requests)) == (1, 1)


async def test_variables_and_the_access_line() -> None:
    async with FakeInstance() as encoder, FakeInstance() as instance:
        async with ProxyProcess(EPD_PROXY_ENCODE_URLS=encoder.url, EPD_PROXY_PREFILL_DECODE_URLS=instance.url) as proxy:
            headers = {"X-Request-Id": "r-1", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
            async with proxy.client.post(CHAT, json=chat(image_part()), headers=headers) as response:
                assert response.status == 200
                size = len(await response.read())
            proxy.terminate()
            code, err = await proxy.end()
        assert code == 0
        lines = [json.loads(line) for line in err.splitlines()]
        [line] = [line for line in lines if line["logger"] == "epd_proxy.access"]
        assert {name: line[name] for name in ("request_id", "status", "path", "model", "items", "encoded", "endpoint",
                                              "encode_endpoints", "attempts", "bytes_out", "trace_id")} == {
            "request_id": "r-1", "status": 200, "path": CHAT, "model": MODEL, "items": 1, "encoded": 1,
            "endpoint": instance.url, "encode_endpoints": [encoder.url], "attempts": 1, "bytes_out": size,
            "trace_id": "a" * 32,
        }  # fmt: skip
        assert 0 < line["encode_s"] <= line["first_byte_s"] <= line["total_s"]


async def test_sigterm_lets_running_requests_end() -> None:
    async with FakeInstance(fake.stream(fake.TEXT, 0.2)) as instance:
        body, broken, code, err = await terminate_in_a_stream(instance, "--drain-timeout-s", "5")
    assert not broken
    assert body.endswith(fake.DONE)
    assert code == 0
    assert "Traceback" not in err


async def test_sigterm_does_not_wait_for_ever() -> None:
    started = time.monotonic()
    async with FakeInstance(fake.stream(fake.TEXT[:1], end="hang")) as instance:
        body, broken, code, err = await terminate_in_a_stream(instance, "--drain-timeout-s", "0.5")
    assert broken
    assert b"event: error" in body
    assert code == 0
    assert "Traceback" not in err
    assert time.monotonic() - started < 10


async def terminate_in_a_stream(instance: FakeInstance, *arguments: str) -> tuple[bytes, bool, int, str]:
    """Stop the proxy after a stream's first bytes; return the rest, whether it was cut, the exit code and the log."""
    async with ProxyProcess("--prefill-decode", instance.url, *arguments) as proxy:
        async with proxy.client.post(CHAT, json=chat(stream=True)) as response:
            await response.content.readany()
            proxy.terminate()
            body, broken = await read_to_break(response)
        return body, broken, *await proxy.end()


async def test_openais_client_works_unchanged() -> None:
    async with (
        ProxyStack() as stack,
        openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="k", max_retries=0) as client,
    ):
        assert [m.id async for m in client.models.list()] == [MODEL]
        part = {"type": "image_url", "image_url": {"url": data_url(picture())}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]
        whole = await client.chat.completions.create(model=MODEL, messages=messages)  # type: ignore[call-overload]
        assert whole.choices[0].message.content == "Ein Täßchen 🍵"
        pieces = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)  # type: ignore[call-overload]
        assert "".join([p.choices[0].delta.content async for p in pieces]) == "Ein Täßchen 🍵"
        stack.instances[0].default = fake.refuse(404, "no such model", "NotFoundError")
        with pytest.raises(openai.NotFoundError, match="no such model"):
            await client.chat.completions.create(model="x", messages=messages)  # type: ignore[call-overload]
        stack.instances[0].default = fake.stream(fake.TEXT[:2], 0.01, end="cut")
        pieces = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="connection broke"):
            [p async for p in pieces]
