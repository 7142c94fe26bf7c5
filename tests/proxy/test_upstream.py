"""The client towards backends, at the wire: what HTTP/1.1 allows works, what breaks it is told as what it is."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from epd_proxy.config import Timeouts
from epd_proxy.errors import (
    BackendConnectError,
    BackendDisconnectError,
    BackendError,
    BackendProtocolError,
    BackendTimeoutError,
)
from epd_proxy.upstream import Call, Upstream, UpstreamResponse, dialing
from epd_proxy.upstream.call import parse_target, write_head
from fakes.wire import Peer, Script, WireBackend, serve, whole

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
MIB = 1024 * 1024


@contextlib.asynccontextmanager
async def opened(**timeouts: float) -> AsyncIterator[Upstream]:
    upstream = Upstream(Timeouts(**timeouts))
    await upstream.start()
    try:
        yield upstream
    finally:
        await upstream.close()
        for _ in range(100):
            if "open=0" in repr(upstream):
                break
            await asyncio.sleep(0.01)
        assert "open=0" in repr(upstream)


def call(body: bytes | None = b"{}", limit_s: float = 5.0, **more: object) -> Call:
    return Call("/v1/x", [("Content-Type", "application/json")], limit_s, body, **more)  # type: ignore[arg-type]


async def fetch(upstream: Upstream, url: str, asked: Call | None = None) -> bytes:
    response = await upstream.send(url, asked or call())
    try:
        return await response.read_all(64 * MIB)
    finally:
        response.close()


def in_pieces(answer: bytes, size: int) -> list[bytes]:
    return [answer[at : at + size] for at in range(0, len(answer), size)]


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (whole(b"hello"), b"hello"),
        (CHUNKED + b"5\r\nhello\r\n6;ext=1\r\n world\r\n0\r\nTrailer: x\r\n\r\n", b"hello world"),
        (INTERIM + whole(b"after 1xx"), b"after 1xx"),
        (b"HTTP/1.1 200 OK\r\ncontent-length:5\r\nX-Empty:\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (whole(b""), b""),
    ],
)  # fmt: skip
async def test_answers_are_read_however_they_are_cut(answer: bytes, body: bytes, size: int) -> None:
    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            await peer.send(*in_pieces(answer, size))
        await peer.until_closed()

    async with WireBackend(script) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == body
        assert await fetch(upstream, backend.url) == body
        assert backend.connections == 1  # and the connection is as good as before


async def test_a_body_without_length_ends_with_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nuntil", b" the end", gap_s=0.01)
        peer.close()

    async with WireBackend(script) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"until the end"
        assert await fetch(upstream, backend.url) == b"until the end"
        assert backend.connections == 2


async def test_the_request_is_what_was_asked() -> None:
    seen: list[tuple[str, bytes]] = []

    async def script(peer: Peer) -> None:
        for _ in range(2):
            seen.append(await peer.request())
            await peer.send(whole())

    async with WireBackend(script) as backend, opened() as upstream:
        headers = [("X-Bytes", b"\xff\xc3\xa4".decode("utf-8", "surrogateescape")), ("X-Request-Id", "r")]
        await fetch(upstream, backend.url, Call("/v1/a?b=%20c", headers, 5, b'{"a": 1}'))
        await fetch(upstream, backend.url, Call("/health", [], 5, method="GET"))
    host = backend.url.removeprefix("http://")
    assert seen[0] == (
        f"POST /v1/a?b=%20c HTTP/1.1\r\nHost: {host}\r\nX-Bytes: \udcffä\r\nX-Request-Id: r\r\n"
        "Content-Length: 8\r\n\r\n",
        b'{"a": 1}',
    )
    assert seen[1] == (f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n", b"")


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "a\rb", "a\0b"])
def test_no_header_can_begin_another(value: str) -> None:
    with pytest.raises(ValueError, match="control character"):
        write_head(Call("/", [("X", value)], 1), parse_target("http://a:1"))


@pytest.mark.parametrize(
    ("url", "authority", "host", "port"),
    [("http://[::1]:81", "[::1]:81", "::1", 81), ("http://[fe80::1%25eth0]", "[fe80::1]", "fe80::1%25eth0", 80),
     ("https://name", "name", "name", 443), ("http://10.0.0.1:8000", "10.0.0.1:8000", "10.0.0.1", 8000)],
)  # fmt: skip
def test_base_urls(url: str, authority: str, host: str, port: int) -> None:
    target = parse_target(url)
    assert (target.authority, target.host, target.port) == (authority, host, port)


async def test_an_ipv6_literal() -> None:
    async with WireBackend(serve(whole(b"six")), host="::1") as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"six"


async def test_a_name_is_resolved() -> None:
    async with WireBackend(serve(whole(b"named"))) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url.replace("127.0.0.1", "localhost")) == b"named"


async def test_a_name_server_that_falls_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known addresses serve on: Docker's name server may lose a question, which is asked again only after 5 s."""
    asked: list[str] = []
    look_up = dialing._look_up

    async def falls_silent(host: str, port: int) -> tuple[str, ...]:
        asked.append(host)
        return await look_up(host, port) if len(asked) == 1 else await asyncio.sleep(60, ())

    monkeypatch.setattr(dialing, "_look_up", falls_silent)
    monkeypatch.setattr(dialing, "_RESOLVED_FOR_S", -1)
    answer = whole(b"named", headers="Connection: close\r\n")
    async with WireBackend(serve(answer)) as backend, opened() as upstream:
        url = backend.url.replace("127.0.0.1", "localhost")
        for n in range(2):
            assert await fetch(upstream, url) == b"named"
            assert asked == ["localhost"] * (n + 1)


@pytest.mark.parametrize("url", ["http://nowhere.invalid:80", "http://127.0.0.1:1", "http://" + "a" * 70 + ":80"])
async def test_what_cannot_be_reached(url: str) -> None:
    async with opened() as upstream:
        with pytest.raises(BackendConnectError):
            await fetch(upstream, url)


@pytest.mark.parametrize(
    "garbage",
    [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12",
     b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED + b"xyz\r\n",
     b"HTTP/1.1 200 OK\r\nX: " + b"a" * MIB, b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200_000],
)  # fmt: skip
async def test_what_is_no_http_is_told(garbage: bytes) -> None:
    async with WireBackend(serve(garbage)) as backend, opened() as upstream:
        with pytest.raises(BackendProtocolError):
            await fetch(upstream, backend.url)


async def test_a_large_head_is_taken() -> None:
    headers = "".join(f"X-{n}: {'v' * 1000}\r\n" for n in range(60))
    async with WireBackend(serve(whole(b"ok", headers=headers))) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        assert (len(response.headers), response.first) == (61, b"ok")
        response.close()


EARLY_ENDS = [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", CHUNKED + b"5\r\nhel",
              CHUNKED + b"5\r\nhello\r\n"]  # fmt: skip


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("begun", EARLY_ENDS)
async def test_an_early_end_is_told(begun: bytes, reset: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(begun, gap_s=0.02)
        (peer.reset if reset else peer.close)()

    async with WireBackend(script) as backend, opened() as upstream:
        with pytest.raises(BackendDisconnectError):
            await fetch(upstream, backend.url)
        assert backend.connections == 1  # a new connection is not stale: nothing is sent twice


def closes_after(answers: int) -> Script:
    """Answer so many requests, read one more, and close without a word."""

    async def script(peer: Peer) -> None:
        for _ in range(answers):
            await peer.request()
            await peer.send(whole())
        await peer.request()

    return script


async def test_a_stale_connection_is_replaced_once() -> None:
    async with WireBackend(closes_after(1), serve(whole(b"new"))) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"{}"
        assert await fetch(upstream, backend.url) == b"new"
        assert backend.connections == 2


async def test_a_second_break_is_no_stale_connection() -> None:
    async with WireBackend(closes_after(1), closes_after(0)) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"{}"
        with pytest.raises(BackendDisconnectError):
            await fetch(upstream, backend.url)
        assert backend.connections == 2


async def test_what_was_begun_is_not_sent_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(whole())
        await peer.request()
        await peer.send(b"HTTP/1.1 2", gap_s=0.02)

    async with WireBackend(script) as backend, opened() as upstream:
        await fetch(upstream, backend.url)
        with pytest.raises(BackendDisconnectError):
            await fetch(upstream, backend.url)
        assert backend.connections == 1


async def test_a_call_that_may_go_once_takes_a_new_connection_and_leaves_none() -> None:
    async with WireBackend(serve(whole(), whole())) as backend, opened() as upstream:
        await fetch(upstream, backend.url)
        await fetch(upstream, backend.url, call(once=True))
        assert (backend.connections, "kept=1" in repr(upstream)) == (2, True)
        await fetch(upstream, backend.url)
        assert backend.connections == 2


@pytest.mark.parametrize(
    "answer", [whole(headers="Connection: close\r\n"), b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"]
)
async def test_a_connection_that_is_to_be_closed_is_not_kept(answer: bytes) -> None:
    async with WireBackend(serve(answer, answer)) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"{}"
        assert await fetch(upstream, backend.url) == b"{}"
        assert backend.connections == 2


@pytest.mark.parametrize("gap_s", [0.0, 0.05])
async def test_an_answer_to_nothing_is_never_taken_for_the_next_one(gap_s: float) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(whole(b"first"), gap_s=gap_s)
        await peer.send(whole(b"smuggled"))
        await peer.until_closed()

    async with WireBackend(script, serve(whole(b"second"))) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"first"
        await asyncio.sleep(0.1)
        assert await fetch(upstream, backend.url) == b"second"


async def test_both_in_one_piece() -> None:
    first = serve(whole(b"first") + whole(b"smuggled"))
    async with WireBackend(first, serve(whole(b"second"))) as backend, opened() as upstream:
        assert await fetch(upstream, backend.url) == b"first"
        assert await fetch(upstream, backend.url) == b"second"


async def test_what_was_not_read_to_its_end_is_closed() -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"5\r\nhello\r\n")
        await peer.until_closed()
        closed.set()

    async with WireBackend(script) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        assert response.first == b"hello"
        response.close()
        response.close()
        await asyncio.wait_for(closed.wait(), 5)
        assert "kept=0" in repr(upstream)


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\n"])
async def test_waiting_for_a_head_has_an_end(begun: bytes) -> None:
    async with WireBackend(serve(begun)) as backend, opened() as upstream:
        with pytest.raises(BackendTimeoutError):
            await fetch(upstream, backend.url, call(limit_s=0.1))


async def test_a_head_that_drips_has_the_same_end() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(*in_pieces(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000, 1), gap_s=0.02)

    async with WireBackend(script) as backend, opened() as upstream:
        with pytest.raises(BackendTimeoutError):
            await fetch(upstream, backend.url, call(limit_s=0.2))


async def test_a_body_that_drips_ends_when_all_of_it_had_to_be_here() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n", *[b"x"] * 10_000, gap_s=0.02)

    async with WireBackend(script) as backend, opened() as upstream:
        with pytest.raises(BackendTimeoutError):
            await fetch(upstream, backend.url, call(limit_s=0.3))


@pytest.mark.parametrize("pumped", [False, True])
async def test_a_stream_may_last_but_not_pause(pumped: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, *[b"1\r\nx\r\n"] * 10, gap_s=0.25)
        await peer.until_closed()

    async with WireBackend(script) as backend, opened(idle_s=2) as upstream:
        response = await upstream.send(backend.url, call())
        got = bytearray(response.first)
        with pytest.raises(BackendTimeoutError):
            await take(response, got, pumped=pumped)
        assert got == (b"x" * 10 if pumped else response.first)  # what is read at once comes whole or not at all
        response.close()


async def take(response: UpstreamResponse, into: bytearray, *, pumped: bool) -> None:
    def write(piece: bytes) -> bool:
        into.extend(piece)
        return True

    if pumped:
        await response.pump(write, lambda: asyncio.sleep(0))
    else:
        into.extend((await response.read_all(100 * MIB))[len(into) :])  # which begins with what came first


@pytest.mark.parametrize("pumped", [False, True])
@pytest.mark.parametrize("end", [b"0\r\n\r\n", b""])
async def test_a_stream_ends_or_breaks(pumped: bool, end: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n", b"1\r\nc\r\n" + end, gap_s=0.01)

    async with WireBackend(script) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        got = bytearray(response.first)
        expected = contextlib.nullcontext() if end else pytest.raises(BackendDisconnectError)
        with expected:
            await take(response, got, pumped=pumped)
        assert got == (b"abc" if pumped or end else response.first)
        response.close()


@pytest.mark.parametrize("pumped", [False, True])
async def test_a_reader_that_waits_holds_the_backend_up(pumped: bool) -> None:
    """And memory with it: of 64 MiB only what the sockets and one buffer hold may be under way."""
    sent = 0
    piece = b"%x\r\n" % 65_536 + b"x" * 65_536 + b"\r\n"

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(CHUNKED)
        for _ in range(1024):
            await peer.send(piece)
            sent += 65_536
        await peer.send(b"0\r\n\r\n")

    async with WireBackend(script) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        go_on = asyncio.Event()
        size_bytes = len(response.first)

        def write(data: bytes) -> bool:
            nonlocal size_bytes
            size_bytes += len(data)
            return go_on.is_set()

        if pumped:
            pumping = asyncio.create_task(response.pump(write, go_on.wait))  # type: ignore[arg-type]
        held = -1
        while held != sent:  # until nothing moves any more
            held = sent
            await asyncio.sleep(0.3)
        assert held < 32 * MIB
        go_on.set()
        if pumped:
            await pumping
        else:
            size_bytes = len(await response.read_all(100 * MIB))
        assert size_bytes == 64 * MIB
        response.close()


async def test_a_large_request_waits_for_the_backend() -> None:
    body = b"x" * 32 * MIB

    async def script(peer: Peer) -> None:
        await asyncio.sleep(0.3)
        _, got = await peer.request()
        await peer.send(whole(b"%d" % len(got)))
        await peer.until_closed()

    async with WireBackend(script) as backend, opened() as upstream:
        sending = asyncio.create_task(fetch(upstream, backend.url, call(body)))
        await asyncio.sleep(0.2)
        [connection] = upstream._open
        assert connection._transport.get_write_buffer_size() < MIB  # type: ignore[union-attr]
        assert await sending == b"%d" % len(body)


async def test_an_answer_may_come_before_the_whole_request_was_sent() -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(whole(b"too large", status="413 Too Large"), gap_s=0.5)

    async with WireBackend(script) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call(b"x" * 32 * MIB))
        assert (response.status, await response.read_all(100)) == (413, b"too large")
        response.close()
        assert "kept=0" in repr(upstream)


async def test_an_answer_over_the_limit() -> None:
    async with WireBackend(serve(whole(b"x" * 1000))) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        with pytest.raises(BackendProtocolError, match="over 999 bytes"):
            await response.read_all(999)
        response.close()


async def test_a_cancelled_call_is_aborted_at_the_backend() -> None:
    gone = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.until_closed()
        gone.set()

    async with WireBackend(script) as backend, opened() as upstream:
        asking = asyncio.create_task(fetch(upstream, backend.url))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(gone.wait(), 5)


async def test_idle_connections_go_after_a_while() -> None:
    async with WireBackend(serve(whole())) as backend, opened() as upstream:
        await fetch(upstream, backend.url)
        assert "open=1 kept=1" in repr(upstream)
        for _ in range(800):
            if "open=0 kept=0" in repr(upstream):
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"still open after 8 s: {upstream}")


async def test_nothing_is_left_of_many_calls() -> None:
    """Broken, cancelled and whole ones: no connection, no timer, no task stays."""
    answers = [whole(), CHUNKED + b"1\r\nx\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"]

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answers[backend.connections % len(answers)])

    async with WireBackend(script) as backend, opened() as upstream:

        async def one(number: int) -> None:
            with contextlib.suppress(BackendError, TimeoutError):
                async with asyncio.timeout(0.0005 if number % 3 == 0 else 5):
                    await fetch(upstream, backend.url)

        for _ in range(5):
            await asyncio.gather(*map(one, range(40)))
        for connection in upstream._open:
            assert (connection.keepable, connection._timer, connection._waiter) == (True, None, None)


@pytest.mark.parametrize("delay_s", [0.0, 0.01])
async def test_what_was_not_sent_whole_is_no_connection_for_the_next(delay_s: float) -> None:
    """The backend would read the next request as the rest of this one's body."""

    async def answers_early(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.reader.readexactly(300_000)
        peer.writer.transport.pause_reading()
        await asyncio.sleep(delay_s)
        await peer.send(whole(b"no", status="401 Unauthorized"))
        peer.writer.transport.resume_reading()
        await peer.until_closed()

    for _ in range(5):
        async with WireBackend(answers_early, serve(whole(b"ok"))) as backend, opened() as upstream:
            response = await upstream.send(backend.url, Call("/v1/x", [], 5, b"b" * 30_000_000))
            assert (response.status, await response.read_all(100)) == (401, b"no")
            response.close()
            assert await fetch(upstream, backend.url) == b"ok"
            assert backend.connections == 2
