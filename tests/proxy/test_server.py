"""The server on the wire: what comes in whatever pieces, and what is answered."""

import asyncio
import logging

import pytest

from epd_proxy.server import Request, Response
from fakes.server import HEAD, served, until


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    "rest", [b"Content-Length: 5\r\n\r\nhello",
             b"Transfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nX-T: 1\r\n\r\n"]
)  # fmt: skip
async def test_bodies_in_pieces_on_one_connection(size: int, rest: bytes) -> None:
    async with served() as connect:
        client = await connect()
        for _ in range(2):
            request = HEAD + rest
            for start in range(0, len(request), size):
                client.send(request[start : start + size])
                await asyncio.sleep(0)
            first, headers, body = await client.answer()
            assert (first, body, headers[b"x-mine"]) == (b"HTTP/1.1 200 OK", b"POST /echo hello", b"1")
            assert b"date" in headers
            assert b"connection" not in headers


async def test_requests_that_come_before_the_answer_are_answered_in_turn() -> None:
    async with served() as connect:
        client = await connect()
        client.send(
            b"".join(HEAD.replace(b"/echo", b"/echo?%d" % n) + b"Content-Length: 1\r\n\r\n%d" % n for n in range(9))
        )
        assert [(await client.answer())[2] for _ in range(9)] == [b"POST /echo?%d %d" % (n, n) for n in range(9)]


@pytest.mark.parametrize(
    ("request_line", "target"),
    [(b"GET /echo?a=%20b HTTP/1.1", b"/echo?a=%20b"), (b"GET http://x.test/echo HTTP/1.1", b"/echo"),
     (b"GET /%65cho HTTP/1.1", b"/%65cho")],
)  # fmt: skip
async def test_targets(request_line: bytes, target: bytes) -> None:
    async with served() as connect:
        client = await connect()
        client.send(request_line + b"\r\nHost: x\r\n\r\n")
        assert (await client.answer())[2] == b"GET " + target + b" "


async def test_a_head_is_answered_as_get_without_the_body() -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"HEAD /ignore HTTP/1.1\r\nHost: x\r\n\r\nGET /ignore HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"Content-Length: 8\r\n" in head
        assert (await client.answer())[2] == b"not read"


@pytest.mark.parametrize(
    ("version", "asked", "kept"),
    [(b"1.1", b"", True), (b"1.1", b"Connection: close\r\n", False), (b"1.0", b"", False),
     (b"1.0", b"Connection: keep-alive\r\n", True)],
)  # fmt: skip
async def test_what_is_kept_open(version: bytes, asked: bytes, kept: bool) -> None:
    async with served() as connect:
        client = await connect()
        for _ in range(2 if kept else 1):
            client.send(b"GET /ignore HTTP/%b\r\nHost: x\r\n%b\r\n" % (version, asked))
            assert (await client.answer())[2] == b"not read"
        if not kept:
            assert await client.reader.read() == b""


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_streams(version: bytes) -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"GET /stream HTTP/%b\r\nHost: x\r\nConnection: close\r\n\r\n" % version)
        head, _, body = (await client.reader.read()).partition(b"\r\n\r\n")
        if version == b"1.0":
            assert body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
        else:
            assert b"Transfer-Encoding: chunked" in head
            assert body == b"9\r\ndata: 0\n\n\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"


@pytest.mark.parametrize("last", [b"", b"data: 0\n\n"])
async def test_a_streams_head_leaves_with_its_first_piece_or_its_end(last: bytes) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handle(request: Request) -> None:
        sent = request.stream(200, [])
        begun.set()
        await go_on.wait()
        sent.end(last)

    async with served(handle) as connect:
        client = await connect()
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        coming = asyncio.create_task(client.reader.readuntil(b"\r\n\r\n"))
        await begun.wait()
        await asyncio.sleep(0.1)
        assert not coming.done()
        go_on.set()
        assert (await coming).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await client.reader.read() == (b"9\r\ndata: 0\n\n\r\n" if last else b"") + b"0\r\n\r\n"


async def test_expect_is_answered_when_the_body_is_wanted() -> None:
    async with served() as connect:
        client = await connect()
        expects = b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        client.send(HEAD + expects)
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"ok")
        assert (await client.answer())[2] == b"POST /echo ok"
        client.send(HEAD.replace(b"/echo", b"/ignore") + expects)
        first, headers, _ = await client.answer()
        assert (first, headers[b"connection"]) == (b"HTTP/1.1 200 OK", b"close")


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
@pytest.mark.parametrize("body", [b"", b"hello"])
async def test_an_upgrade_is_not_made(upgrade: bytes, body: bytes) -> None:
    async with served() as connect:
        client = await connect()
        length = b"Content-Length: %d\r\n" % len(body) if body else b""
        client.send(HEAD + b"Connection: Upgrade\r\nUpgrade: %b\r\n%b\r\n%b" % (upgrade, length, body))
        first, _, answered = await client.answer()
        assert (first, answered) == (b"HTTP/1.1 200 OK", b"POST /echo " + body)
        client.send(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.answer())[2] == b"GET /echo "


async def test_a_client_that_leaves_ends_its_handler() -> None:
    ended = asyncio.Event()

    async def wait(_request: Request) -> Response:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        raise AssertionError

    async with served(wait) as connect:
        client = await connect()
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        listener = connect.listener  # type: ignore[attr-defined]
        await until(lambda: any(not each.idle for each in listener.connections))
        client.writer.close()
        await ended.wait()


async def test_a_defect_is_a_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"GET /fail HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.answer())[0] == b"HTTP/1.1 500 Internal Server Error"
        assert [(r.levelno, r.exc_info is not None) for r in caplog.records] == [(logging.ERROR, True)]


async def test_no_header_ends_a_line_early() -> None:
    async def split(_request: Request) -> Response:
        return Response(200, b"", [("X", "a\r\nSet-Cookie: b")])

    async with served(split) as connect:
        client = await connect()
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        first, headers, _ = await client.answer()
        assert first.startswith(b"HTTP/1.1 500 ")
        assert b"set-cookie" not in headers


async def test_stopping_lets_what_is_under_way_end() -> None:
    go_on = asyncio.Event()

    async def wait(_request: Request) -> Response:
        await go_on.wait()
        return Response(200, b"whole")

    async with served(wait) as connect:
        listener = connect.listener  # type: ignore[attr-defined]
        idle, busy = await connect(), await connect()
        busy.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: any(not each.idle for each in listener.connections))
        listener.stop()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*busy.writer.get_extra_info("peername"))
        closing = asyncio.create_task(listener.close(grace_s=30))
        assert await idle.reader.read() == b""
        go_on.set()
        _, headers, body = await busy.answer()
        assert (headers[b"connection"], body) == (b"close", b"whole")
        assert await busy.reader.read() == b""
        await closing


async def test_a_head_behind_a_large_body_may_come_in_two_parts() -> None:
    async with served() as connect:
        client = await connect()
        client.send(HEAD + b"Content-Length: 200000\r\n\r\n" + b"a" * 200_000 + b"GET /ignore HTTP/1.1\r\nHo")
        await asyncio.sleep(0.05)
        client.send(b"st: x\r\n\r\n")
        assert len((await client.answer())[2]) > 200_000
        assert (await client.answer())[2] == b"not read"
