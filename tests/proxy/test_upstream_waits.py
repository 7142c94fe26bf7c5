"""Waits of the client towards backends: each has an end, and whoever reads slowly holds up whoever sends."""

import asyncio
import contextlib

import pytest

from epd_proxy.errors import BackendDisconnectError, BackendProtocolError, BackendTimeoutError
from epd_proxy.upstream import UpstreamResponse
from fakes.upstream import MIB, call, fetch, opened
from fakes.wire import CHUNKED, Peer, WireBackend, in_pieces, serve, whole


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
        into.extend(await response.pump(write, lambda: asyncio.sleep(0)))
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


async def test_what_comes_with_the_end_of_a_stream_is_returned() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n", b"1\r\nc\r\n0\r\n\r\n", gap_s=0.1)

    async with WireBackend(script) as backend, opened() as upstream:
        response = await upstream.send(backend.url, call())
        got = bytearray(response.first)

        def write(piece: bytes) -> bool:
            got.extend(piece)
            return True

        last = await response.pump(write, lambda: asyncio.sleep(0))
        assert last.endswith(b"c")
        assert got + last == b"abc"
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
            rest = await pumping
            size_bytes += len(rest)
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
