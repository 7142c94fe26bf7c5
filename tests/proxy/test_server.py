"""The server on the wire: what comes in whatever pieces, what is answered, and what is not waited for."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from epd_proxy.errors import ProxyError
from epd_proxy.server import Handler, Listener, Request, Response, Routes, Waits, error_response

HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\n"


async def echo(request: Request) -> Response:
    body = b""
    while piece := await request.more():
        body += piece
    return Response(200, b"%b %b %b" % (request.method.encode(), request.target.encode(), body), [("X-Mine", "1")])


async def ignore(_request: Request) -> Response:
    return Response(200, b"not read")


async def fail(_request: Request) -> Response:
    raise RuntimeError("a defect")


async def stream(request: Request) -> None:
    sent = request.stream(200, [("Content-Type", "text/event-stream")])
    for number in range(3):
        sent.write(b"data: %d\n\n" % number)
    sent.end()


class Client:
    """A plain connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[bytes, dict[bytes, bytes], bytes]:
        """Return status line, headers and body of the next answer that has a length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines)
        return first, headers, await self.reader.readexactly(int(headers.get(b"content-length", b"0")))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for ``condition``."""
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true")


@contextlib.asynccontextmanager
async def served(handler: Handler | None = None, **options: object) -> AsyncIterator[Callable[[], object]]:
    """Serve ``handler``, or all of them by path; gives what opens connections."""
    routes = Routes(lambda _request, error: error_response(error))
    for path, each in (("/echo", echo), ("/ignore", ignore), ("/fail", fail), ("/stream", stream)):
        for method in ("GET", "POST"):
            routes.add(method, path, each)
    listener = Listener(handler or routes.handle, **options)  # type: ignore[arg-type]
    await listener.start("127.0.0.1", 0)
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_connection(*listener.addresses[0])))
        return clients[-1]

    connect.listener = listener  # type: ignore[attr-defined]
    try:
        yield connect
    finally:
        for client in clients:
            client.writer.close()
        await listener.close(grace_s=0.1)
        assert not listener.connections


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


async def test_too_many_requests_before_the_answer_end_the_connection() -> None:
    async with served() as connect:
        client = await connect()
        client.send(b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        answers = (await client.reader.read()).count(b"HTTP/1.1 200 OK")
        assert 1 <= answers <= 66


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


async def test_a_head_behind_a_large_body_may_come_in_two_parts() -> None:
    async with served() as connect:
        client = await connect()
        client.send(HEAD + b"Content-Length: 200000\r\n\r\n" + b"a" * 200_000 + b"GET /ignore HTTP/1.1\r\nHo")
        await asyncio.sleep(0.05)
        client.send(b"st: x\r\n\r\n")
        assert len((await client.answer())[2]) > 200_000
        assert (await client.answer())[2] == b"not read"
