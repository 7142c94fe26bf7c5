"""The server on the wire: what is refused, what is not waited for, and how much is taken of anyone."""

import asyncio
import contextlib

import pytest

from epd_proxy.errors import ProxyError
from epd_proxy.server import Request, Response, Waits, error_response
from fakes.server import HEAD, echo, served, until


async def test_too_many_requests_before_the_answer_end_the_connection() -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        answers = (await client.reader.read()).count(b"HTTP/1.1 200 OK")
        assert 1 <= answers <= 66


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"nonsense\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
     (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400),
     (b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc", 400),
     (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 1000 + b"\r\n", 400),
     (b"GET / HTTP/1.1\r\nX: y\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nHost: x\r\nhost: y\r\n\r\n", 400),
     (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400)],
)  # fmt: skip
async def test_what_is_no_http_is_told_and_the_connection_ends(data: bytes, status: int) -> None:
    async with served(_answering_errors) as connect:
        client = await connect()
        client.send(data)
        first, headers, body = await client.answer()
        assert first.startswith(b"HTTP/1.1 %d " % status)
        assert b'"BadRequestError"' in body
        assert headers[b"connection"] == b"close"
        assert await client.reader.read() == b""


async def _answering_errors(request: Request) -> Response:
    try:
        return await echo(request)
    except ProxyError as error:
        return error_response(error)


async def test_a_head_without_end_is_refused() -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"GET /echo HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                client.send(b"X-Long: " + b"x" * 4000 + b"\r\n")
                await client.writer.drain()
                await asyncio.sleep(0.001)
        assert (await client.answer())[0].startswith(b"HTTP/1.1 431 ")


async def test_a_head_without_end_that_comes_at_once_is_refused_at_once() -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"GET /echo HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000)
        async with asyncio.timeout(5):  # of the 30 s that a head may take
            assert (await client.answer())[0].startswith(b"HTTP/1.1 431 ")


async def test_whoever_is_slow_or_idle_is_cut_off() -> None:
    waits = Waits(head_s=0.2, idle_s=0.2, linger_s=0.2)
    async with served(waits=waits) as connect:
        silent, slow, idle, unread = [await connect() for _ in range(4)]
        slow.send(b"GET /echo HTTP/1.1\r\nHo")
        idle.send(b"GET /ignore HTTP/1.1\r\nHost: x\r\n\r\n")
        unread.send(b"POST /ignore HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
        assert (await idle.answer())[2] == b"not read"
        for client in (silent, slow, idle):
            with contextlib.suppress(ConnectionError):
                assert await client.reader.read() == b""
        listener = connect.listener  # type: ignore[attr-defined]
        await until(lambda: not listener.connections)


async def test_a_body_that_nobody_reads_does_not_cost_the_answer() -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"POST /ignore HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n\r\n")
        for _ in range(30):
            client.send(b"x" * 10**6)
            await client.writer.drain()
        first, headers, body = await client.answer()
        assert (first, headers[b"connection"], body) == (b"HTTP/1.1 200 OK", b"close", b"not read")
        assert await client.reader.read() == b""


BROKEN = [
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /echo#part HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"Content-Length: x\r\n\r\n",
]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("answered", [0, 1])
async def test_what_is_broken_is_told_also_after_a_good_request(broken: bytes, answered: int) -> None:
    async with served() as connect:
        client = await connect()
        for _ in range(answered):
            client.send(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await client.answer())[0] == b"HTTP/1.1 200 OK"
        client.send(broken)
        assert (await client.answer())[0].startswith(b"HTTP/1.1 400 ")
        assert await client.reader.read() == b""


@pytest.mark.parametrize("size", [300_000, 600_000, 700_000])
async def test_a_large_body_that_nobody_read_is_no_end_of_the_connection(size: int) -> None:
    async def late(_request: Request) -> Response:
        await asyncio.sleep(0.2)
        return Response(503, b"busy")

    async with served(late) as connect:
        client = await connect()
        for _ in range(2):
            client.send(HEAD + b"Content-Length: %d\r\n\r\n" % size + b"a" * size)
            assert (await client.answer())[2] == b"busy"


async def test_a_client_that_does_not_read_gets_no_further_answers() -> None:
    handled = 0

    async def large(_request: Request) -> Response:
        nonlocal handled
        handled += 1
        return Response(200, b"m" * 60_000)

    async with served(large) as connect:
        client = await connect()
        client.writer.transport.pause_reading()
        for _ in range(40):
            client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
            await asyncio.sleep(0.005)
        (connection,) = connect.listener.connections
        await until(lambda: connection.full)
        before = handled
        await asyncio.sleep(0.1)
        assert handled == before < 2000
        assert connection.transport.get_write_buffer_size() < 1024 * 1024


async def test_trailers_have_an_end() -> None:
    async def careful(request: Request) -> Response:
        try:
            return await echo(request)
        except ProxyError as error:
            return error_response(error)

    async with served(careful) as connect:
        client = await connect()
        client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ")
        for _ in range(200):
            client.send(b"x" * 4000)
            await asyncio.sleep(0)
        assert (await client.answer())[0].startswith(b"HTTP/1.1 400 ")
