"""The client towards backends, at the wire: what HTTP/1.1 allows works, what breaks it is told as what it is."""

import asyncio

import pytest

from epd_proxy.errors import BackendConnectError, BackendDisconnectError, BackendProtocolError
from epd_proxy.upstream import Call, dialing
from epd_proxy.upstream.call import parse_target, write_head
from fakes.upstream import MIB, call, fetch, opened
from fakes.wire import CHUNKED, Peer, WireBackend, in_pieces, serve, whole

INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"


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
